"""Changed networks give what the plain ones give."""

import itertools

import pytest
import torch
from nnturbo.engine.backends.rewrites import (
    ExactInstanceNorm,
    LowConvolution,
    Upsampling,
    with_low_convolutions,
    with_shuffles,
)
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network
from torch import nn

from tests.engine.factory import multi_task, plans_2d, plans_json, write_model


def model_of(tmp_path, plans, **arguments):
    return read_model(write_model(tmp_path / "m", plans=plans, **arguments))


def tiles_for(model):
    return torch.randn(2, 1, *model.plan.patch_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("convolution", "grid"),
    [
        *itertools.product(
            [(nn.ConvTranspose3d, (2, 2, 2)), (nn.ConvTranspose3d, (1, 2, 2)), (nn.ConvTranspose3d, (3, 1, 2))],
            [(3, 4, 5), (1, 1, 1)],
        ),
        ((nn.ConvTranspose2d, (2, 2)), (4, 5)),
        ((nn.ConvTranspose2d, (4, 1)), (1, 7)),
    ],
)
def test_upsampling_is_the_transposed_convolution(convolution, grid, bias):
    kind, stride = convolution
    transposed = kind(6, 5, stride, stride, bias=bias)
    coarse = torch.randn(2, 6, *grid)
    with torch.no_grad():
        expected, got = transposed(coarse), Upsampling(transposed)(coarse)
    assert got.shape == expected.shape
    # Equal but for the order of the six products of a sum.
    assert torch.allclose(got, expected, rtol=0, atol=1e-6)
    assert got.abs().max() > 0.1


def test_upsampling_is_exact_where_sums_are():
    transposed = nn.ConvTranspose3d(6, 5, (2, 1, 2), (2, 1, 2))
    with torch.no_grad():
        for parameter in transposed.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape))
        coarse = torch.randint(-8, 9, (2, 6, 3, 4, 5)).float()
        assert torch.equal(Upsampling(transposed)(coarse), transposed(coarse))


@pytest.mark.parametrize("plans", [plans_json(), plans_2d(), multi_task(plans_json(), kind="attention")])
def test_a_network_with_shuffles_gives_the_same_logits(tmp_path, plans):
    model = model_of(tmp_path, plans)
    tiles = tiles_for(model)
    plain, shuffled = inference_network(model), with_shuffles(inference_network(model))
    for one, other in zip(shuffled(tiles), plain(tiles), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert one.std() > 0.01
    transposed, kinds = {nn.ConvTranspose3d, nn.ConvTranspose2d}, {type(module) for module in shuffled.modules()}
    assert Upsampling in kinds
    assert not transposed & kinds
    assert transposed & {type(module) for module in plain.modules()}


class TestLowConvolutions:
    def test_convolutions_alone_are_low_and_the_last_ones_are_not(self, tmp_path):
        network = inference_network(model_of(tmp_path, multi_task(plans_json(), kind="attention"), folds=("0", "1")))
        low = with_low_convolutions(with_shuffles(network), torch.bfloat16)
        kinds = {name: parameter.dtype for name, parameter in low.named_parameters()}
        halved = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
        assert all(".convolution." in name for name in halved)
        convolutions = [module for module in low.modules() if isinstance(module, (nn.Conv3d, nn.Conv2d))]
        full = [module for module in convolutions if module.weight.dtype == torch.float32]
        assert full == [fold.decoder.seg_layers[0] for fold in low.networks]
        assert len(convolutions) > len(full)
        assert sum(isinstance(module, LowConvolution) for module in low.modules()) == len(convolutions) - len(full)

    def test_every_name_of_a_shared_module_leads_to_the_same_one(self, tmp_path):
        low = with_low_convolutions(inference_network(model_of(tmp_path, plans_json())), torch.bfloat16)
        by_name = dict(low.named_modules(remove_duplicate=False))
        wrapped = [name for name, module in by_name.items() if isinstance(module, LowConvolution)]
        assert len({id(by_name[name]) for name in wrapped}) < len(wrapped)  # the library has several names for one
        left = [
            name
            for name, module in by_name.items()
            if isinstance(module, nn.Conv3d) and not isinstance(by_name[name.rpartition(".")[0]], LowConvolution)
        ]
        assert all("seg_layers" in name for name in left)

    def test_logits_are_float32_and_close(self, tmp_path):
        model = model_of(tmp_path, multi_task(plans_json()))
        tiles = tiles_for(model)
        exact = inference_network(model)(tiles)
        low = with_low_convolutions(inference_network(model), torch.bfloat16)(tiles)
        for one, other in zip(low, exact, strict=True):
            assert one.dtype == torch.float32
            assert 0 < (one - other).abs().max() < 0.05 * other.abs().max()


@pytest.mark.parametrize("grid", [(7, 13, 5), (8, 256), (131, 1), (2, 1, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_exact_norms_are_instance_norms(grid, affine):
    torch.manual_seed(0)
    norm = (nn.InstanceNorm2d if len(grid) == 2 else nn.InstanceNorm3d)(3, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    values = 5 + torch.randn(2, 3, *grid)
    assert torch.allclose(ExactInstanceNorm(norm)(values), norm(values), atol=1e-5)


@pytest.mark.parametrize("grid", [(512, 512), (96, 97, 53)])
@pytest.mark.parametrize("level", [0.0, 37.0])
def test_exact_norms_add_up_nearly_as_in_float64(grid, level):
    """Constant but for a rim, as a blank tile's features are: added up in one float32, means are off by 1 in 1000."""
    values = torch.full((1, 2, *grid), level)
    values[..., 0] += 1 / 3
    norm = (nn.InstanceNorm2d if len(grid) == 2 else nn.InstanceNorm3d)(2)
    exact = norm(values.double())
    assert (ExactInstanceNorm(norm)(values) - exact).abs().max() < 1e-4 * exact.abs().max()
