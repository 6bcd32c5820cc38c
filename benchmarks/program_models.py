"""Model folders with seeded weights, in the places and under the names in which other programs look for theirs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnturbo.engine.model.network import make_network
from nnturbo.engine.model.plans import parse_plan
from torch import Tensor, nn

from .stages import smooth_field
from .task_models import plans_json

BANDS = 5
"""Of intensity, that have a label of their own. With many, all voxels would be near a tie, unlike trained ones."""
DARK = 0.1
"""Share of the fitted patch that is background."""
SLOPE = 4.0
"""How fast logits part where intensity leaves the border of two bands."""
ABSENT = -100.0
"""Logit of the other labels."""
FITTED_PATCH = (64, 64, 64)
FITTED_NOISE = 0.5
"""Standard deviation of the noise that the labels do not follow."""
EVERY = 7
"""Of the voxels of a patch, this share is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Widths and patch of a network.

    Args:
        features: Of each stage.
        patch: Edge of the patch in voxels.
    """

    features: tuple[int, ...]
    patch: int


SIZES = {
    "small": Size(features=(16, 32, 64), patch=64),
    "usual": Size(features=(32, 64, 128, 256, 320, 320), patch=128),  # what nnU-Net plans for CT at 1.5 mm
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededModel:
    """A model that a program expects.

    Args:
        folder: Of the data set, under the program's folder of models.
        trainer: Name in the model folder and the checkpoint.
        labels: By name, background included.
        spacing_mm: Of its grid.
        reader: nnU-Net's class that reads scans.
        mirror_axes: Axes that it was trained to be mirrored along, None for none.
        fold: Its only one.
        has_configuration: Whether the model folder, `TRAINER__PLANS__CONFIGURATION`, lies in the data set's.
        common: Labels that surely occur.
    """

    folder: str
    trainer: str
    labels: dict[str, int]
    spacing_mm: float
    reader: str = "SimpleITKIO"
    mirror_axes: tuple[int, ...] | None = (0, 1, 2)
    fold: str = "0"
    has_configuration: bool = True
    common: tuple[str, ...] = ()

    def write(self, parent: Path, size: Size) -> Path:
        """Write its folder, and give its path."""
        plans, dataset = self._plans(size), self._dataset()
        plan = parse_plan(plans, dataset, "3d_fullres")
        network = make_network(plan.architecture, 1, len(self.labels)).to_empty(device="cpu")
        set_weights(network, zlib.crc32(self.folder.encode()))
        fit_last_layer(network, [label for name, label in self.labels.items() if name in self.common])
        folder = parent / self.folder
        if self.has_configuration:
            folder /= f"{self.trainer}__nnUNetPlans__3d_fullres"
        (folder / f"fold_{self.fold}").mkdir(parents=True)
        (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
        (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
        checkpoint = {
            "network_weights": network.state_dict(),
            "init_args": {"configuration": "3d_fullres"},
            "trainer_name": self.trainer,
            "inference_allowed_mirroring_axes": self.mirror_axes,
        }
        torch.save(checkpoint, folder / f"fold_{self.fold}" / "checkpoint_final.pth")
        return folder

    def _dataset(self) -> dict[str, Any]:
        return {"channel_names": {"0": "CT"}, "labels": self.labels, "numTraining": 1, "file_ending": ".nii.gz"}

    def _plans(self, size: Size) -> dict[str, Any]:
        plans, stages = plans_json("PlainConvUNet", [size.patch] * 3), len(size.features)
        plans |= {"dataset_name": self.folder, "image_reader_writer": self.reader}
        configuration = plans["configurations"]["3d_fullres"]
        configuration["spacing"] = [self.spacing_mm] * 3
        configuration["architecture"]["arch_kwargs"] |= {
            "n_stages": stages, "features_per_stage": list(size.features), "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)], "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
        }  # fmt: skip
        return plans


def set_weights(network: nn.Module, seed: int) -> None:
    """Give a network random weights that keep the size of its features."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data.normal_(0, (2 / fan_in) ** 0.5 if parameter.ndim > 1 else 0.1, generator=generator)
        if ".norm.weight" in name:
            parameter.data.add_(1)


def fit_last_layer(network: nn.Module, common: Sequence[int]) -> None:
    """Fit the last layer to bands of intensity, so that labels have shapes, as trained ones do.

    Intensity is a linear function of the features by least squares. The logits are lines over it, the steeper the
    brighter the band; two neighbours cross at the border of their bands.

    Args:
        network: With random weights.
        common: Labels that get a band; more are added up to `BANDS`.
    """
    field = smooth_field((1, *FITTED_PATCH), 0)
    tile = field + FITTED_NOISE * torch.randn(field.shape, generator=torch.Generator().manual_seed(1))
    last: Any = network.get_submodule("decoder.seg_layers")[-1]  # type: ignore[index]
    features = _features(network, last, tile[None])[::EVERY]
    intensity = field.flatten()[::EVERY].double()
    line = torch.linalg.lstsq(features, intensity[:, None]).solution[:, 0].float()
    banded = sorted({0, *common, *range(1, 1 + min(BANDS, last.out_channels) - len({0, *common}))})
    borders = torch.quantile(intensity.float(), torch.linspace(DARK, 1, len(banded))[:-1])
    steepness = SLOPE * (torch.arange(len(banded)) - len(banded) // 2)
    offsets = -SLOPE * torch.cat((torch.zeros(1), borders)).cumsum(0)
    last.weight.data.zero_()
    last.bias.data.fill_(ABSENT)
    last.weight.data[banded] = (steepness[:, None] * line[:-1]).reshape(len(banded), *last.weight.shape[1:])
    last.bias.data[banded] = steepness * line[-1] + offsets - offsets[len(banded) // 2]


@torch.inference_mode()
def _features(network: nn.Module, last: nn.Module, tile: Tensor) -> Tensor:
    """What the last layer sees, (voxels, features and 1)."""
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network.eval()(tile)
    hook.remove()
    features = seen[0].movedim(1, -1).flatten(0, -2).double()
    return torch.cat((features, torch.ones_like(features[:, :1])), dim=1)
