"""Build nnU-Net model folders around small networks whose labels have structure without any training."""

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from tests.parity.catalogue import RESIDUAL_BOTH_WAYS, RESIDUAL_CLASS
from tests.parity.kinds import ModelKind
from tests.parity.plans import make_dataset_json, make_plans
from tests.parity.scans import smooth_field
from tests.parity.stock import quiet

FITTED_LOGIT = 6.0
"""Logit that a fitted head aims at: this for the right label, its negative for the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model folder on disk.

    Attributes:
        path: Folder for nnturbo.
        stock_path: Folder with the same model in a spelling that stock nnU-Net can read here.
    """

    path: Path
    stock_path: Path


def build_model_folder(kind: ModelKind, parent: Path) -> ModelFolder:
    """Write the model folder of a kind.

    Args:
        kind: What to build.
        parent: Existing folder that receives it.

    Returns:
        The folder, and its twin for stock where stock needs one.
    """
    stock_kind = readable_by_stock(kind)
    weights = {fold: make_weights(stock_kind, fold) for fold in kind.folds}
    stock_path = _write_folder(stock_kind, weights, parent / "stock")
    if stock_kind == kind:
        return ModelFolder(path=stock_path, stock_path=stock_path)
    prefixed = {
        fold: {f"{kind.weights_prefix}{key}": value for key, value in state.items()} for fold, state in weights.items()
    }
    return ModelFolder(path=_write_folder(kind, prefixed, parent / "own"), stock_path=stock_path)


def readable_by_stock(kind: ModelKind) -> ModelKind:
    """Spell the same model so that stock reads it.

    Note:
        Stock refuses weights with a prefix. It searches for classes that have moved, but the search imports every
        architecture, and with them torchvision, which does not load beside a CPU build of torch.
    """
    where_stock_looks = (RESIDUAL_CLASS, RESIDUAL_BOTH_WAYS.class_name)
    if kind.network.residual and (kind.plans == "old" or kind.network.class_name not in where_stock_looks):
        kind = replace(kind, plans="current", network=replace(kind.network, class_name=RESIDUAL_CLASS))
    return replace(kind, weights_prefix="")


def make_weights(kind: ModelKind, fold: int | str) -> dict[str, Tensor]:
    """Make the weights of one fold: random, and with a fitted head unless the kind wants nothing but random ones."""
    seed = zlib.crc32(f"{kind.name} {fold}".encode())
    with quiet(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = _build_network(kind)
        _perturb(network)
        patches = _training_patches(kind, seed)
        if kind.network.batch_norm:
            _settle_running_statistics(network, patches)
        if kind.weights == "fitted":
            _fit_head(network, patches, nested=kind.regions_class_order is not None)
    return network.state_dict()


def _build_network(kind: ModelKind) -> nn.Module:
    dataset_json = make_dataset_json(kind)
    plans_manager = PlansManager(make_plans(kind))
    configuration = plans_manager.get_configuration(kind.configuration)
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        determine_num_input_channels(plans_manager, configuration, dataset_json),
        _label_manager(kind).num_segmentation_heads,
        deep_supervision=False,
    )


def _label_manager(kind: ModelKind) -> LabelManager:
    return PlansManager(make_plans(kind)).get_label_manager(make_dataset_json(kind))


def _perturb(network: nn.Module) -> None:
    """Move biases and norms away from 0 and 1, where a wrong or missing one would not show."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, _InstanceNorm | _BatchNorm) and not module.affine:
                continue
            if isinstance(module, _InstanceNorm | _BatchNorm):
                module.weight.copy_(1 + 0.3 * torch.randn_like(module.weight))
                module.bias.copy_(0.3 * torch.randn_like(module.bias))
            elif getattr(module, "bias", None) is not None:
                module.bias.copy_(0.1 * torch.randn_like(module.bias))


def _training_patches(kind: ModelKind, seed: int) -> Tensor:
    """Make normalised patches as the network sees them, with the previous stage's labels as further channels."""
    extra_channels = len(_label_manager(kind).foreground_labels) if kind.previous_stage is not None else 0
    patches = []
    for i in range(4):
        fields = [smooth_field(kind.patch_size, kind.spacing, seed + 31 * i + c) for c in range(len(kind.channels))]
        fields += [(fields[0] > 0.5 * c).astype(float) for c in range(extra_channels)]
        patches.append(np.stack(fields))
    return torch.from_numpy(np.stack(patches)).float()


def _settle_running_statistics(network: nn.Module, patches: Tensor) -> None:
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(patches)


def _fit_head(network: nn.Module, patches: Tensor, *, nested: bool) -> None:
    """Fit the last layer to intensity bands of the first channel by least squares.

    Args:
        network: U-Net of dynamic_network_architectures, changed in place.
        patches: (N, C, *patch).
        nested: Whether a region holds all the ones after it.
    """
    head = network.decoder.seg_layers[-1]
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network.eval()(patches)
    hook.remove()
    features = seen[0].movedim(1, -1).flatten(0, -2).double()
    features = torch.cat((features, torch.ones_like(features[:, :1])), dim=1)
    n_logits = head.out_channels
    intensity = patches[:, 0].flatten()
    n_edges = n_logits if nested else n_logits - 1
    edges = torch.quantile(intensity, torch.linspace(0.4, 1, n_edges + 1)[:-1])
    band = torch.bucketize(intensity, edges)[:, None]
    wanted = band > torch.arange(n_logits) if nested else band == torch.arange(n_logits)
    solution = torch.linalg.lstsq(features, FITTED_LOGIT * (2.0 * wanted.double() - 1)).solution.float()
    with torch.no_grad():
        head.weight.copy_(solution[:-1].T.reshape(head.weight.shape))
        head.bias.copy_(solution[-1])


def _write_folder(kind: ModelKind, weights: dict[int | str, dict[str, Tensor]], parent: Path) -> Path:
    folder = parent / f"nnUNetTrainer__nnUNetPlans__{kind.configuration}"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(make_plans(kind), indent=4))
    (folder / "dataset.json").write_text(json.dumps(make_dataset_json(kind), indent=4))
    for fold, state in weights.items():
        (folder / f"fold_{fold}").mkdir()
        torch.save(_make_checkpoint(kind, fold, state), folder / f"fold_{fold}" / kind.checkpoint)
    return folder


def _make_checkpoint(kind: ModelKind, fold: int | str, state: dict[str, Tensor]) -> dict[str, Any]:
    """Lay out a checkpoint as `nnUNetTrainer.save_checkpoint` does, numpy scalars and momentum included."""
    parameters = [nn.Parameter(value.clone()) for value in state.values() if value.is_floating_point()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.99, weight_decay=3e-5, nesterov=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    checkpoint = {
        "network_weights": state,
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 12},
        "logging": {
            "mean_fg_dice": [np.float64(0.41), np.float32(0.52)],
            "dice_per_class_or_region": [[np.float32(0.4), np.float32(0.42)], [np.float32(0.5), np.float32(0.54)]],
            "train_losses": [np.float32(0.1), np.float32(-0.2)],
            "lrs": [0.01, 0.0099],
        },
        "_best_ema": np.float64(0.43),
        "current_epoch": 2,
        "init_args": {
            "plans": make_plans(kind),
            "configuration": kind.configuration,
            "fold": fold,
            "dataset_json": make_dataset_json(kind),
            "device": torch.device("cuda", 0),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": kind.mirror_axes,
    }
    if kind.mirror_axes == "missing":
        del checkpoint["inference_allowed_mirroring_axes"]
    return checkpoint
