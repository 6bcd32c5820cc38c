"""U-Nets with a classification head on their features: nnturbo's own, and those of other programs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .classification import ClassificationScheme
from .described_head import DescribedHead
from .heads import Head, focus_map, make_head
from .plan_classes import network_class


class MultiTaskUNet(nn.Module):
    """A U-Net with a classification head on its encoder; both outputs need one pass through the encoder.

    Parameters of encoder and decoder have the names of the U-Net; names of the head's parameters begin with `head`.

    Args:
        input_channels, num_classes: As nnU-Net passes them to every network.
        backbone: Class of the U-Net, such as "dynamic_network_architectures.architectures.unet.PlainConvUNet".
        head: Description of the head as in `plans.json`, see `ClassificationScheme`.
        deep_supervision: Whether the decoder gives logits at every resolution.
        arguments: Further arguments of the U-Net.

    Raises:
        ModelError: For a class that is not allowed, or a head that the U-Net cannot feed.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        backbone: str,
        head: Mapping[str, Any],
        deep_supervision: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.scheme = ClassificationScheme.parse(head)
        unet: Any = network_class(backbone)(
            input_channels=input_channels, num_classes=num_classes, deep_supervision=deep_supervision, **arguments
        )
        self.initialize = unet.initialize  # nnU-Net calls it
        # Programs that load pretrained weights look for these; ResidualUNet has none.
        for name in ("key_to_encoder", "key_to_stem", "keys_to_in_proj"):
            if hasattr(unet, name):
                setattr(self, name, getattr(unet, name))
        self.encoder, self.decoder = unet.encoder, unet.decoder
        self.head: Head = make_head(self.scheme, tuple(self.encoder.output_channels))

    def forward(self, tiles: Tensor) -> Tensor | list[Tensor]:
        """Segmentation logits alone, (N, K, *patch); a list of them by resolution under deep supervision."""
        return self.decoder(self.encoder(tiles))

    def forward_multitask(self, tiles: Tensor, *, detached: bool = False) -> tuple[Tensor | list[Tensor], Tensor]:
        """Give both outputs.

        Args:
            tiles: (N, C, *patch).
            detached: Whether the head's gradients stop before the encoder.

        Returns:
            The output of `forward`, and class logits (N, S) float32.
        """
        features, seg_logits = self._features_and_logits(tiles)
        finest = seg_logits[0] if isinstance(seg_logits, list) else seg_logits
        seen = [feature.detach() for feature in features] if detached else features
        # Half precision is enough for the features, but not for the few numbers that the head computes.
        with _without_autocast(tiles.device):
            return seg_logits, self.head(seen, self._focus(finest.detach().float()))

    def _features_and_logits(self, tiles: Tensor) -> tuple[Sequence[Tensor], Tensor | list[Tensor]]:
        features = self.encoder(tiles)
        return features, self.decoder(features)

    def _focus(self, seg_logits: Tensor) -> Tensor:
        return focus_map(seg_logits, self.scheme)


class DescribedUNet(MultiTaskUNet):
    """A U-Net with the classification head of another program.

    Args:
        unet: With encoder and decoder.
        head: Reads their features.
        scheme: What it answers.
    """

    def __init__(self, unet: Any, head: DescribedHead, scheme: ClassificationScheme) -> None:
        nn.Module.__init__(self)
        self.scheme, self.head = scheme, head
        self.encoder, self.decoder = unet.encoder, unet.decoder
        self.taps_decoder = head.description.taps_decoder

    def _features_and_logits(self, tiles: Tensor) -> tuple[Sequence[Tensor], Tensor | list[Tensor]]:
        if not self.taps_decoder:
            return super()._features_and_logits(tiles)
        features = list(self.encoder(tiles))
        decoder: Any = self.decoder
        values, decoded = features[-1], []
        for index, (finer, stage) in enumerate(zip(decoder.transpconvs, decoder.stages, strict=True)):
            values = stage(torch.cat([finer(values), features[-(index + 2)]], 1))
            decoded.insert(0, values)
        return [*features, *decoded], decoder.seg_layers[-1](values)

    def _focus(self, seg_logits: Tensor) -> Tensor:
        if not isinstance(self.head, DescribedHead):  # a fitted classifier took its place
            return super()._focus(seg_logits)
        return self.head.mask(torch.sigmoid(seg_logits) if self.scheme.regions else torch.softmax(seg_logits, 1))


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off; the meta device, on which shapes are checked, has no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
