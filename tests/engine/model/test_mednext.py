"""MedNeXt, against MONAI's version and the numbers of its paper."""

import re

import pytest
import torch
from nnturbo.engine.model.folds import inference_network

from tests.engine.model.named_models import (
    SIZES,
    by_formula,
    figures,
    filled,
    mednext,
    model_of,
    plans_of,
    tiles_of,
    waves_of,
)


@pytest.mark.parametrize(("size", "kernel", "millions"), [
    ("S", 3, 5.6), ("S", 5, 6.0), ("B", 3, 10.5), ("B", 5, 11.0), ("M", 3, 17.6), ("M", 5, 18.3), ("L", 3, 61.8),
    ("L", 5, 63.0),
])  # fmt: skip
def test_mednext_has_the_published_number_of_parameters(size, kernel, millions):
    with torch.device("meta"):
        network = mednext(size, kernel, 14)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.055)


def of_monai(name):
    """The name that MONAI has for a weight."""
    for ours, theirs in (
        ("enc_block", "enc_stages"),
        ("down", "down_blocks"),
        ("up", "up_blocks"),
        ("dec_block", "dec_stages"),
    ):
        if match := re.match(rf"{ours}_(\d)\.(.*)", name):
            level = int(match[1]) if ours in ("enc_block", "down") else 3 - int(match[1])
            return f"{theirs}.{level}.{match[2]}"
    return name


@pytest.mark.parametrize(("size", "kernel"), [("S", 3), ("B", 5), ("M", 3)])
def test_mednext_is_monais(tmp_path, size, kernel):
    """Which was written by others; there, blocks that halve the grid expand as those before them."""
    nets = pytest.importorskip("monai.networks.nets.mednext", reason="compares with MONAI's version")
    weights = filled(mednext(size, kernel, width=8, shifted=True))
    counts, expansions = SIZES[size]
    theirs = nets.MedNeXt(
        init_filters=8,
        out_channels=3,
        kernel_size=kernel,
        use_residual_connection=True,
        encoder_expansion_ratio=expansions[:4],
        bottleneck_expansion_ratio=expansions[4],
        decoder_expansion_ratio=expansions[5:],
        blocks_down=counts[:4],
        blocks_bottleneck=counts[4],
        blocks_up=counts[5:],
    )
    renamed = {of_monai(name): tensor for name, tensor in weights.items()}
    theirs.load_state_dict({**theirs.state_dict(), **renamed})
    saved = {**weights, "dummy_tensor": torch.ones(1), "out_1.conv_out.weight": torch.zeros(64, 3, 1, 1, 1)}
    model = model_of(tmp_path / "m", saved, f"nnUNetTrainerV2_MedNeXt_{size}_kernel{kernel}")
    logits = inference_network(model)(tiles_of())[0]
    assert torch.allclose(logits, theirs.eval()(tiles_of()), atol=1e-4)
    assert logits.std() > 0.1


@pytest.mark.parametrize(("size", "expected"), [
    ("S", [4.174232, 27.32299, -0.45947, 7.56709, 12.03473]), ("B", [4.04032, 26.118896, -0.45192, 8.14412, 12.90985]),
])  # fmt: skip
def test_mednext_is_its_authors(tmp_path, size, expected):
    """The figures are those of the class MedNeXt in their repository, MIC-DKFZ/MedNeXt, with the same weights."""
    weights = by_formula(mednext(size, width=8))
    model = model_of(tmp_path / "m", weights, f"nnUNetTrainerV2_MedNeXt_{size}_kernel3")
    assert figures(inference_network(model)(waves_of((32, 32, 32)))[0]) == pytest.approx(expected, abs=5e-3)


def test_mednext_of_slices(tmp_path):
    network = mednext(width=4, dimensions=2)
    plans = plans_of(patch=(32, 32), class_name="somewhere.MedNeXt")
    plans["configurations"]["3d_fullres"]["spacing"] = [1.0, 1.0]
    model = model_of(tmp_path / "m", filled(network), "nnUNetTrainer", plans)
    assert inference_network(model)(torch.randn(1, 1, 32, 32))[0].shape == (1, 3, 32, 32)
    assert model.remarks == ()
