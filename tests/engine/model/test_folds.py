import itertools

import pytest
import torch
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import (
    ExactInstanceNorm,
    InferenceNetwork,
    LowConvolution,
    Upsampling,
    inference_network,
    with_low_convolutions,
    with_shuffles,
)
from nnturbo.engine.model.network import build_network
from torch import nn

from tests.engine.factory import multi_task, plans_2d, plans_json, pooled_classifier, write_model


def model_of(tmp_path, plans, **arguments):
    return read_model(write_model(tmp_path / "m", plans=plans, **arguments))


def tiles_for(model, count=2):
    return torch.randn(count, 1, *model.plan.patch_size, generator=torch.Generator().manual_seed(1))


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


@pytest.mark.parametrize(
    "plans", [plans_json(), plans_2d(), multi_task(plans_json()), multi_task(plans_json(), kind="attention")]
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_network_of_inference_gives_the_logits_of_the_one_that_was_trained(tmp_path, plans, shuffled):
    model = model_of(tmp_path, plans)
    tiles = tiles_for(model)
    trained = build_network(model.plan, model.weights[0])
    network = inference_network(model)
    if shuffled:
        network = with_shuffles(network)
    got = network(tiles)
    expected = trained.forward_multitask(tiles) if network.multi_task else (trained(tiles),)
    assert len(got) == len(expected) == (2 if model.plan.classification else 1)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert one.std() > 0.01
    kinds = {type(module) for module in network.modules()}
    assert (Upsampling in kinds) == shuffled
    assert bool({nn.ConvTranspose3d, nn.ConvTranspose2d} & kinds) != shuffled


def test_logits_of_deep_supervision_are_gone(tmp_path):
    plans = plans_json()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
    }
    model = model_of(tmp_path, plans)
    trained, network = build_network(model.plan, model.weights[0]), inference_network(model)
    assert len(trained.decoder.seg_layers) == 2
    assert len(network.networks[0].decoder.seg_layers) == 1
    tiles = tiles_for(model)
    assert torch.allclose(network(tiles)[0], trained(tiles), atol=1e-4)


def test_folds_are_averaged(tmp_path):
    model = model_of(tmp_path, multi_task(plans_json()), folds=("0", "1", "2"))
    tiles = tiles_for(model)
    network = inference_network(model)
    singles = [InferenceNetwork([fold])(tiles) for fold in network.networks]
    for index, averaged in enumerate(network(tiles)):
        assert torch.allclose(averaged, sum(single[index] for single in singles) / 3, atol=1e-5)
        assert not torch.allclose(averaged, singles[0][index], atol=1e-2)


def test_a_fitted_classifier_takes_the_place_of_the_head(tmp_path):
    plans = multi_task(plans_json())
    fitted = inference_network(model_of(tmp_path / "a", plans, checkpoint={"pooled_classifier": pooled_classifier()}))
    plain = inference_network(model_of(tmp_path / "b", plans))
    tiles = torch.randn(1, 1, 8, 12, 16)
    assert torch.equal(fitted(tiles)[0], plain(tiles)[0])
    assert not torch.allclose(fitted(tiles)[1], plain(tiles)[1], atol=1e-2)


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
