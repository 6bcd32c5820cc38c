import pytest
import torch
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import InferenceNetwork, inference_network
from nnturbo.engine.model.network import build_network

from tests.engine.factory import multi_task, plans_2d, plans_json, pooled_classifier, write_model


def model_of(tmp_path, plans, **arguments):
    return read_model(write_model(tmp_path / "m", plans=plans, **arguments))


def tiles_for(model):
    return torch.randn(2, 1, *model.plan.patch_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "plans", [plans_json(), plans_2d(), multi_task(plans_json()), multi_task(plans_json(), kind="attention")]
)
def test_the_network_of_inference_gives_the_logits_of_the_one_that_was_trained(tmp_path, plans):
    model = model_of(tmp_path, plans)
    tiles = tiles_for(model)
    trained = build_network(model.plan, model.weights[0])
    network = inference_network(model)
    got = network(tiles)
    expected = trained.forward_multitask(tiles) if network.multi_task else (trained(tiles),)
    assert len(got) == len(expected) == (2 if model.plan.classification else 1)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert one.std() > 0.01


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
