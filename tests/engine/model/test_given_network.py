"""Networks that a program gives in place of the plan's."""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, CheckpointError, Engine, ModelError, Volume
from nnturbo.engine.backends.rewrites import with_low_convolutions
from nnturbo.engine.backends.torch import network_for_gpu
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.folds import inference_network
from nnturbo.engine.model.given_network import GivenLogits, GivenNetwork
from nnturbo.engine.model.network import build_network
from torch import nn

from tests.engine.factory import multi_task, plans_2d, plans_json, smooth_scan, write_model


class Plain(nn.Module):
    """A network of nobody's: two convolutions; deep supervision gives a second, coarser output."""

    def __init__(self, channels: int = 1, outputs: int = 3, form: type | None = None, dimensions: int = 3) -> None:
        super().__init__()
        convolution = nn.Conv3d if dimensions == 3 else nn.Conv2d
        self.first = convolution(channels, 6, 3, padding=1)
        self.last = convolution(6, outputs, 1)
        self.form = form

    def forward(self, tiles):
        logits = 8 * self.last(torch.tanh(self.first(tiles)))
        return logits if self.form is None else self.form([logits, logits[..., ::2]])


def seeded(make, seed):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return make()


def plain_factory(
    network_class_name,
    arch_kwargs,
    arch_kwargs_req_import,
    num_input_channels,
    num_output_channels,
    *,
    enable_deep_supervision,
):
    assert network_class_name.endswith("PlainConvUNet")
    assert arch_kwargs["n_stages"] == 2
    assert arch_kwargs_req_import == ("conv_op", "norm_op", "dropout_op", "nonlin")
    assert enable_deep_supervision is False
    return Plain(num_input_channels, num_output_channels)


def folder_of_plain(folder, folds=("0", "1"), **arguments):
    """A model folder whose weights are of `Plain`, whatever its plan says."""
    write_model(folder, folds=folds, checkpoint={"network_weights": {}}, **arguments)
    for seed, fold in enumerate(folds):
        path = folder / f"fold_{fold}" / "checkpoint_final.pth"
        content = torch.load(path, weights_only=False)
        content["network_weights"] = seeded(Plain, seed).state_dict()
        torch.save(content, path)
    return folder


@pytest.fixture(scope="module")
def scan():
    return Volume.from_array(smooth_scan((9, 24, 26)), (3.0, 1.2, 1.2), name="scan")


def load(folder, **arguments):
    return Engine.load(folder, **{"device": "cpu", "mirror": False, **arguments})


def test_a_module_runs_with_the_weights_it_has(tmp_path, scan):
    """A network that says the sign of its input: labels of the whole path are known."""

    class Sign(nn.Module):
        def forward(self, tiles):
            return torch.cat([torch.zeros_like(tiles), tiles, -tiles], 1)

    plans = plans_json(spacing=[3.0, 1.2, 1.2])
    engine = load(write_model(tmp_path / "m", plans=plans), network=Sign(), mirror=True)
    expected = np.where(scan.array[0] > 50, 1, np.where(scan.array[0] < 50, 2, 0))  # the plan's mean
    prediction = engine.predict(scan)
    assert np.array_equal(prediction.segmentation, expected)
    provenance = prediction.provenance[0]
    assert provenance.network.endswith(".Sign")
    assert provenance.mirror_views == 8
    assert provenance.folds == ()
    assert provenance.checkpoint is None
    assert list(provenance.source) == ["network"]
    assert provenance.to_json()["network"].endswith(".Sign")


@pytest.mark.parametrize("form", [tuple, list])
def test_of_several_outputs_the_first_counts(tmp_path, scan, form):
    folder = write_model(tmp_path / "m")
    one = seeded(Plain, 3)
    several = seeded(lambda: Plain(form=form), 3)
    expected = load(folder, network=one).predict(scan).segmentation
    assert len(np.unique(expected)) > 1
    assert np.array_equal(load(folder, network=several).predict(scan).segmentation, expected)


def test_a_factory_gets_the_weights_of_each_fold(tmp_path):
    model = read_model(folder_of_plain(tmp_path / "m"), given=GivenNetwork(given=plain_factory))
    tiles = torch.randn(2, 1, *model.plan.patch_size)
    expected = torch.stack([seeded(Plain, seed)(tiles) for seed in (0, 1)]).mean(0)
    assert torch.allclose(inference_network(model)(tiles)[0], expected, atol=1e-6)


def test_a_trainers_method_can_be_given_as_it_is(tmp_path):
    """In both of nnU-Net's forms; the network is the plan's, so it runs as if nothing was given."""
    pytest.importorskip("nnunetv2", reason="calls with nnU-Net's managers")
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    def of_managers(plans_manager, configuration_manager, inputs, outputs, enable_deep_supervision=True):
        assert plans_manager.dataset_name == "Dataset900_Test"
        return get_network_from_plans(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            inputs,
            outputs,
            deep_supervision=enable_deep_supervision,
        )

    def of_arguments(name, arguments, imports, inputs, outputs, enable_deep_supervision=True):
        return get_network_from_plans(
            name, arguments, imports, inputs, outputs, deep_supervision=enable_deep_supervision
        )

    folder = write_model(tmp_path / "m", folds=("0", "1"))
    plain = inference_network(read_model(folder))
    tiles = torch.randn(2, 1, 8, 12, 16)
    for factory in (of_managers, of_arguments):
        given = inference_network(read_model(folder, given=GivenNetwork(given=factory)))
        assert not given.given  # of a class that is known: also for the kernels
        assert torch.equal(given(tiles)[0], plain(tiles)[0])


def test_the_callers_module_stays_as_it_is(tmp_path, scan):
    folder = write_model(tmp_path / "m")
    model = read_model(folder)
    unet = build_network(model.plan, model.weights[0]).train().requires_grad_(True)
    unet.decoder.deep_supervision = True
    names = list(unet.state_dict())
    expected = load(folder).predict(scan).segmentation
    wrapped = nn.DataParallel(unet)
    engine = load(folder, network=wrapped)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    assert np.array_equal(engine.predict(scan).segmentation, expected)
    assert unet.training
    assert unet.decoder.deep_supervision
    assert all(parameter.requires_grad for parameter in unet.parameters())
    assert list(unet.state_dict()) == names


def test_a_program_of_torchscript_can_be_given(tmp_path, scan):
    folder = write_model(tmp_path / "m")
    network = seeded(Plain, 3)
    expected = load(folder, network=network).predict(scan).segmentation
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        script = torch.jit.trace(network, torch.zeros(1, 1, 8, 12, 16))
    assert np.array_equal(load(folder, network=script).predict(scan).segmentation, expected)


def test_a_compiler_runs_it_when_it_is_named(tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    monkeypatch.setenv("NNTURBO_CACHE", str(tmp_path / "cache"))
    network = seeded(Plain, 3)
    engine = load(write_model(tmp_path / "m"), network=network, backend="openvino")
    tiles = torch.randn(1, 1, 8, 12, 16)
    logits = engine.segmenter.runner(tiles).seg_logits
    assert torch.allclose(logits, network(tiles), atol=1e-4)
    assert engine.provenance[0].backend == "openvino"
    assert not (tmp_path / "cache").exists()  # nothing tells when its code changes


def test_the_kernels_refuse_a_class_that_they_do_not_know(tmp_path):
    with pytest.raises(BackendUnavailable, match="of classes that it knows"):
        load(write_model(tmp_path / "m"), network=Plain(), backend="native")


def test_layers_of_a_given_network_are_not_replaced_on_a_gpu(tmp_path):
    network = inference_network(read_model(write_model(tmp_path / "m"), given=GivenNetwork(given=Plain())))
    kinds = [type(module) for module in network.modules()]
    assert network_for_gpu(network, torch.device("cuda"), "fp16") is network
    assert [type(module) for module in network.modules()] == kinds
    assert network.networks[0].network.first.bias is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_the_last_layers_of_a_given_network_stay_in_float32(tmp_path, dtype):
    network = inference_network(read_model(write_model(tmp_path / "m"), given=GivenNetwork(given=Plain())))
    assert isinstance(network.networks[0], GivenLogits)
    low = with_low_convolutions(network, dtype).networks[0].network
    assert low.last.weight.dtype == torch.float32
    assert low.first.convolution.weight.dtype == dtype


def test_without_a_checkpoint_the_only_configuration_is_taken(tmp_path, scan):
    folder = tmp_path / "m"
    write_model(folder, folds=())
    engine = load(folder, network=seeded(Plain, 3), mirror=True)
    assert engine.provenance[0].mirror_views == 1
    assert len(np.unique(engine.predict(scan).segmentation)) > 1
    plans = plans_json()
    plans["configurations"]["2d"] = plans_2d()["configurations"]["3d_fullres"]
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match="no checkpoint that names its configuration: name one of 3d_fullres, 2d"):
        load(folder, network=Plain())
    slices = load(folder, network=seeded(lambda: Plain(dimensions=2), 3), configuration="2d")
    assert len(np.unique(slices.predict(scan).segmentation)) > 1


def test_the_class_of_a_case_is_left_out_and_that_is_said(tmp_path, scan, caplog):
    folder = write_model(tmp_path / "m", plans=multi_task(plans_json()))
    with caplog.at_level(logging.WARNING, logger="nnturbo"):
        assert load(folder, network=seeded(Plain, 3)).predict(scan).classification is None
    assert "Plain segments only" in caplog.text


def test_other_weights_and_other_factories_are_other_settings(tmp_path):
    folder = write_model(tmp_path / "m")
    one, same, other = (load(folder, network=seeded(Plain, seed)).provenance[0].settings for seed in (3, 3, 4))
    assert one == same != other
    assert one != load(folder).provenance[0].settings


class Failing(nn.Module):
    def forward(self, tiles):
        raise KeyError("what")


class Nothing(nn.Module):
    def forward(self, tiles):
        return {"logits": tiles}


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            lambda: Plain(outputs=4),
            r"must turn a tile \(1, 1, 8, 12, 16\) into logits \(1, 3, 8, 12, 16\).* gives \(1, 4,",
        ),
        (lambda: Plain(channels=2), "must turn a tile .* expected input"),
        (lambda: nn.Sequential(Plain(), nn.AvgPool3d(2)), r"it gives \(1, 3, 4, 6, 8\)"),
        (Failing, "it gives 'what'"),
        (Nothing, "it gives .*'dict' object has no attribute"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_on_load(tmp_path, network, message):
    with pytest.raises(ModelError, match=message) as raised:
        load(write_model(tmp_path / "m"), network=network())
    assert "\n" not in str(raised.value)


def test_a_factory_that_does_not_fit_is_refused_on_load(tmp_path, monkeypatch):
    folder = folder_of_plain(tmp_path / "m")
    with pytest.raises(
        CheckpointError, match="must fit the given network .*2 missing, such as 0.weight, 0.bias; 4 unk"
    ):
        load(folder, network=lambda *arguments, **options: nn.Sequential(nn.Conv3d(1, 3, 1)))
    with pytest.raises(CheckpointError, match=r"2 of another shape, such as last\.weight"):
        load(folder, network=lambda *arguments, **options: Plain(outputs=5))
    with pytest.raises(ModelError, match=r"must give a torch\.nn\.Module, it gave 3"):
        load(folder, network=lambda *arguments, **options: 3)
    with pytest.raises(ModelError, match=r"it fails: .*unexpected keyword argument 'enable_deep_supervision'"):
        load(folder, network=Plain)
    monkeypatch.setitem(sys.modules, "nnunetv2.utilities.plans_handling.plans_handler", None)
    with pytest.raises(ModelError, match="pip install nnunetv2"):
        load(folder, network=lambda plans_manager, *arguments, **options: None)


def test_arguments_that_make_no_sense_are_refused(tmp_path):
    folder = write_model(tmp_path / "m")
    with pytest.raises(
        TypeError, match=r"network must be a torch\.nn\.Module, or a function that makes one, got 'Plain'"
    ):
        load(folder, network="Plain")
    with pytest.raises(ValueError, match="folds must be left out"):
        load(folder, network=Plain(), folds=[0])
    (folder / "engine.json").write_text("{}")
    with pytest.raises(ValueError, match="is a bundle, whose network is compiled"):
        load(folder, network=Plain())
