"""The path from a scan to its labels together with its network, as one TorchScript program."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...model.plans import Plan
from .path import ScanPath, compiled


class _OneAnswer(nn.Module):
    """Runs a network with one output, segmentation logits."""

    def __init__(self, network: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run (N, C, *patch)."""
        output: tuple[Tensor] = self.network(tiles)
        return output[0], None


class _TwoAnswers(nn.Module):
    """Runs a network with two outputs, segmentation and class logits."""

    def __init__(self, network: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run (N, C, *patch)."""
        output: tuple[Tensor, Tensor] = self.network(tiles)
        return output[0], output[1]


class WholePath(nn.Module):
    """A scan path and its network. Compile it with `whole_path`; `.save()` then writes a program in one file.

    Args:
        path: Path around the network.
        network: Compiled network; gives a tuple of segmentation logits and, where the path has classes, class logits.
    """

    class_names: list[str]
    label_names: list[str]

    def __init__(self, path: ScanPath, network: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.class_names, self.label_names, self.channels = path.class_names, path.label_names, path.channels
        self.path = path
        self.network = _TwoAnswers(network) if path.class_names else _OneAnswer(network)

    def forward(
        self, image: Tensor, spacing: list[float], tile_step_size: float = 0.5, mirror: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Segment a scan; arguments as in `ScanPath.start`, on the network's device, answers as in `ScanPath.finish`.

        On a CPU, mirror views go through the network one at a time: more at once take memory and no less time.
        """
        with torch.no_grad():
            state = self.path.start(image, spacing, tile_step_size, mirror)
            for tile in range(state.tiles.shape[0]):
                views = self.path.views(state, tile)
                at_once = 1 if views.device.type == "cpu" else views.shape[0]
                seg_logits: list[Tensor] = []
                class_logits: list[Tensor] = []
                for batch in views.split(at_once):
                    seg, classes = self.network(batch)
                    seg_logits.append(seg)
                    if classes is not None:
                        class_logits.append(classes)
                answer = torch.cat(class_logits) if len(class_logits) > 0 else None
                state = self.path.add(state, tile, torch.cat(seg_logits), answer)
            return self.path.finish(state)


def whole_path(
    network: torch.jit.ScriptModule, plan: Plan, mirror_axes: Sequence[int], aggregation: str = "foreground"
) -> torch.jit.ScriptModule:
    """Compile the path of a plan together with its network.

    Args:
        network: Scripted or traced, from (N, C, *patch) to a tuple of segmentation logits (N, K, *patch) and, where the
            plan has a classification head, class logits (N, S).
        plan: The model's plan.
        mirror_axes: Axes of the patch that the model was trained to be mirrored along.
        aggregation: How the class logits of tiles are averaged: "foreground" or "mean".

    Raises:
        ModelError: For a plan that `ScanPath.of_plan` refuses, or a network with other outputs.
        TypeError: For a network that is not compiled.
    """
    if not isinstance(network, torch.jit.ScriptModule):
        raise TypeError(f"network must be a torch.jit.ScriptModule, got {type(network).__name__}: trace it first")
    path = ScanPath.of_plan(plan, mirror_axes, aggregation)
    try:
        return compiled(WholePath(path, network))
    except RuntimeError as error:
        expected = "(seg_logits, class_logits)" if path.class_names else "(seg_logits,)"
        raise ModelError(f"the network must give a tuple {expected}; {str(error).strip()[:300]}") from error
