"""Memory that torch's operations hold at the same time, counted on the meta device, which computes nothing."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what is allocated and freed while it is entered.

    Attributes:
        live: Bytes of tensors that are still there.
        most: The most that there were.
    """

    def __init__(self):
        super().__init__()
        self.live = self.most = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if function is torch.ops.aten.conv3d.default:  # as cuDNN lays it out
            result = result.contiguous(memory_format=torch.channels_last_3d)
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, count):
        self.live -= count
