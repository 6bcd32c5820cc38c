"""Networks that a trainer builds although the plan names another one: a list by trainer and class."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .architecture import Architecture
from .mednext import make_mednext
from .plan_classes import NETWORKS
from .plans import Plan
from .stu_net import make_stu_net

UNCHANGED = re.compile(
    r"nnUNetTrainer(_\d+epochs?|Benchmark|(_|No)?DA|_noDummy|NoMirroring|_NoMirroring|_onlyMirror|_warmup|CosAnneal|Ada|Vanilla|"
    r"Dice|Topk|CELoss|_probabilisticOversampling|NoDeepSupervision|MultiTask|$)|nnUNet_Trainer_BS\d+$"
)
"""Trainers that train the network of their plan; other trainers may train another network."""

BATCH_NORM = re.compile(r"nnUNetTrainerBN(_\w+)?$")
"""Trainers of the plan's network with batch norms."""

CHANGED = re.compile(
    r"mamba|swin|unetr|nnformer|transunet|xlstm|ukan|mednext_?v?2|ux_?net|light_?m_?unet|missformer|segformer|nnsam|unet3p",
    re.IGNORECASE,
)
"""Parts of names of trainers that are known to build other networks, which nnturbo does not have."""

Make = Callable[[Plan, Mapping[str, Tensor]], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedNetwork:
    """A network that nnturbo has, and what it is trained by.

    Args:
        name: In words.
        trainers: Names of trainers that build it.
        classes: Last names of classes in plans that mean it.
        make: Builds it for a plan and weights, which may tell its sizes.
        unused: Names of weights that inference does not use.
    """

    name: str
    trainers: re.Pattern[str]
    classes: re.Pattern[str]
    make: Make
    unused: re.Pattern[str]


def _primus(plan: Plan, version: str, size: str) -> nn.Module:
    """Build a Primus as its trainers do (nnunetv2/training/nnUNetTrainer/primus/primus_trainers.py)."""
    if len(plan.patch_size) != 3 or any(size % 8 for size in plan.patch_size):
        raise ModelError(
            f"a patch for Primus must have three axes, each a multiple of 8, the plan has {plan.patch_size}"
        )
    try:
        from dynamic_network_architectures.architectures import primus
    except (ImportError, RuntimeError) as error:  # torchvision that does not fit torch raises the latter
        reason = str(error).partition("\n")[0]
        raise ModelError(f"Primus needs timm and einops, which cannot be imported here: {reason:.160}") from error
    made = getattr(primus, f"Primus{version}{size}", None)
    if made is None:
        raise ModelError(f"Primus{version}{size} needs a newer dynamic-network-architectures: pip install -U it")
    # Its positions are computed when it is built, so it cannot be built without memory.
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made(
            plan.input_channels,
            plan.labels.num_outputs,
            patch_embed_size=(8, 8, 8),
            input_shape=plan.patch_size,
            scale_attn_inner=True,
            init_values=0.1,
        )


def _primus_of(version: str, size: str) -> NamedNetwork:
    return NamedNetwork(
        name=f"Primus{version} {size}",
        trainers=re.compile(rf"(nnUNet_|_)Primus_?{version}_?{size}(_\w+)?"),
        classes=re.compile(rf"Primus{version}{size}"),
        make=lambda plan, weights: _primus(plan, version, size),
        unused=re.compile(r"$."),
    )


def _stu_net(plan: Plan, weights: Mapping[str, Tensor]) -> nn.Module:
    strides = plan.architecture.arguments.get("strides")
    if not isinstance(strides, list) or not all(isinstance(stride, list) for stride in strides):
        raise ModelError(f"plans.json must have a list of strides for STU-Net, got {strides!r:.80}")
    with torch.device("meta"):
        return make_stu_net(plan.input_channels, plan.labels.num_outputs, weights, strides)


def _mednext(plan: Plan, weights: Mapping[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        return make_mednext(plan.input_channels, plan.labels.num_outputs, weights)


NAMED = (
    *(_primus_of(version, size) for version in ("", "V2", "V3") for size in "SBML"),
    NamedNetwork(
        name="STU-Net",
        trainers=re.compile(r"STUNetTrainer(_(small|base|large|huge))?(_\w+)?"),
        classes=re.compile(r"STUNet"),
        make=_stu_net,
        unused=re.compile(r"seg_outputs\.[0-3]\."),
    ),
    NamedNetwork(
        name="MedNeXt",
        trainers=re.compile(r"\w*MedNeXt(?!_?[vV]?2)\w*"),
        classes=re.compile(r"MedNeXt(V1)?"),
        make=_mednext,
        unused=re.compile(r"out_[1-4]\.|dummy_tensor$"),
    ),
)


def named_network(architecture: Architecture, trainer: str) -> NamedNetwork | None:
    """Find the network that a trainer builds; None for the one that the plan describes.

    Raises:
        ModelError: For trainers that are known to build others, and where trainer and plan name two.
    """
    short = architecture.class_name.rpartition(".")[2]
    by_trainer = [each for each in NAMED if each.trainers.fullmatch(trainer)]
    by_class = [each for each in NAMED if each.classes.fullmatch(short)]
    if by_trainer and short not in NETWORKS and by_trainer != by_class:
        raise ModelError(
            f"{trainer:.80} trains {by_trainer[0].name}, but plans.json names the network {short:.80}: which one the "
            f"weights are of must be clear; {HOW_TO_GIVE}"
        )
    if by_trainer or by_class:
        return (by_trainer or by_class)[0]
    if CHANGED.search(trainer) and not UNCHANGED.match(trainer):
        raise ModelError(
            f"{trainer:.80} trains a network that plans.json does not show and nnturbo does not have; {HOW_TO_GIVE}"
        )
    return None


HOW_TO_GIVE = "give it in Python: Engine.load(folder, network=TrainerClass.build_network_architecture)"
"""What to do about a network that nnturbo does not have."""


def trained_architecture(architecture: Architecture, trainer: str) -> Architecture:
    """Give the architecture that a trainer builds of the plan's: batch norms in place of others for nnUNetTrainerBN."""
    convolution = str(architecture.arguments.get("conv_op"))
    if not BATCH_NORM.match(trainer) or not convolution.endswith(("1d", "2d", "3d")):
        return architecture
    changes = {
        "norm_op": f"torch.nn.modules.batchnorm.BatchNorm{convolution[-2:]}",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    }
    return replace(architecture, arguments={**architecture.arguments, **changes})
