"""The native backend: torch's logits from nnturbo's own kernels, for the networks that it takes."""

import copy

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, Engine, Volume, build
from nnturbo.engine.backends import choose, native
from nnturbo.engine.backends.native import Block, Decoder, NativeBackend, plan_overwriting
from nnturbo.engine.backends.torch import TorchBackend
from nnturbo.engine.bundles.manifest import read_manifest
from nnturbo.engine.model.folder import read_model

from tests.engine.factory import multi_task, plans_2d, plans_json, smooth_scan, write_model

CPU = torch.device("cpu")
MISSING = NativeBackend().unavailable(CPU, "fp32")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
LIBRARY = "dynamic_network_architectures.architectures.unet"


@pytest.fixture(autouse=True)
def threads():
    """Two threads, among which the kernels divide their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def plans(network="PlainConvUNet", patch=(8, 24, 32), **changes):
    """A plan whose channels suit the kernels, with three stages."""
    made = plans_json(patch_size=list(patch))
    architecture = made["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = f"{LIBRARY}.{network}"
    arguments = architecture["arch_kwargs"]
    arguments |= {
        "n_stages": 3,
        "features_per_stage": [32, 32, 64],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
        **changes,
    }
    if network != "PlainConvUNet":
        arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
    if network == "ResidualUNet":
        arguments["n_blocks_per_stage_decoder"] = arguments.pop("n_conv_per_stage_decoder")
    return made


KINDS = {
    "plain": plans(),
    "residual encoder": plans("ResidualEncoderUNet"),
    "multi-task": multi_task(plans(), kind="attention"),
    "relu, without biases": plans(nonlin="torch.nn.ReLU", conv_bias=False),
    "odd sizes": plans(patch=(6, 20, 36)),
    "wide": plans(features_per_stage=[32, 64, 128], n_conv_per_stage=[1, 1, 3]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("least", [1, native.LEAST_VOXELS])
def test_logits_are_those_of_torch_for_any_number_of_tiles(tmp_path, monkeypatch, kind, least):
    monkeypatch.setattr(native, "LEAST_VOXELS", least)
    model = read_model(write_model(tmp_path / "m", plans=KINDS[kind]))
    expected_of = TorchBackend().load(model, None, CPU, "fp32")
    runner = NativeBackend().load(model, None, CPU, "fp32")
    for count in (1, 3):
        tiles = torch.randn(count, 1, *model.plan.patch_size, generator=torch.Generator().manual_seed(count))
        expected, got = expected_of(tiles), runner(tiles)
        assert got.seg_logits.is_contiguous()
        scale = float(expected.seg_logits.std())
        assert float((got.seg_logits - expected.seg_logits).abs().max()) < 3e-4 * scale
        assert (got.class_logits is None) == (expected.class_logits is None)
        if expected.class_logits is not None:
            torch.testing.assert_close(got.class_logits, expected.class_logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "residual encoder", "multi-task"])
def test_overwriting_changes_nothing_where_planned_and_what_is_read_again_elsewhere(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(native, "LEAST_VOXELS", 1)
    model = read_model(write_model(tmp_path / "m", plans=KINDS[kind]))
    tile = torch.randn(1, 1, *model.plan.patch_size, generator=torch.Generator().manual_seed(1))

    def logits(change):
        runner = NativeBackend().load(model, None, CPU, "fp32")
        change(runner._network)
        return torch.cat([part.flatten() for part in runner(tile) if part is not None])

    def blocks(network):
        return {name: module for name, module in network.named_modules() if isinstance(module, Block)}

    def overwrite_nothing(network):
        for block in blocks(network).values():
            block.convolve.may_overwrite = False

    planned = logits(lambda network: None)
    assert torch.equal(planned, logits(overwrite_nothing))

    def overwrite_also(name):
        return lambda network: setattr(blocks(network)[name].convolve, "may_overwrite", True)

    network = NativeBackend().load(model, None, CPU, "fp32")._network
    differing = {name for name in blocks(network) if not torch.equal(planned, logits(overwrite_also(name)))}
    # A plain network's first blocks read one channel, or have a stride: they cannot overwrite what they are given.
    assert bool(differing) == (kind != "plain"), "a flag that is wrong must show"
    assert not differing & {name for name, block in blocks(network).items() if block in plan_overwriting(network)}


def test_several_folds_are_averaged(tmp_path):
    model = read_model(write_model(tmp_path / "m", plans=plans(), folds=("0", "1")))
    tile = torch.randn(1, 1, *model.plan.patch_size, generator=torch.Generator().manual_seed(0))
    expected = TorchBackend().load(model, None, CPU, "fp32")(tile).seg_logits
    got = NativeBackend().load(model, None, CPU, "fp32")(tile).seg_logits
    assert float((got - expected).abs().max()) < 3e-4 * float(expected.std())


def test_what_comes_from_the_encoder_is_not_copied(tmp_path):
    model = read_model(write_model(tmp_path / "m", plans=plans()))
    runner = NativeBackend().load(model, None, CPU, "fp32")
    assert any(isinstance(module, Decoder) for module in runner._network.modules())
    assert not [
        module
        for module in runner._network.modules()
        if isinstance(module, (torch.nn.Conv3d, torch.nn.ConvTranspose3d))
    ]


class TestChoice:
    @pytest.fixture(autouse=True)
    def automatic(self, monkeypatch):
        monkeypatch.setitem(choose.AUTOMATIC, "cpu", ("native", "torch"))

    def test_auto_takes_it_for_networks_that_suit_it(self, tmp_path):
        model = write_model(tmp_path / "m", plans=plans())
        assert Engine.load(model, device="cpu").provenance[0].backend == "native"

    @pytest.mark.parametrize("unsuited", [plans_2d(), plans_json(), plans(norm_op=None, norm_op_kwargs=None)])
    def test_auto_takes_another_one_for_others(self, tmp_path, unsuited):
        model = write_model(tmp_path / "m", plans=copy.deepcopy(unsuited))
        assert Engine.load(model, device="cpu").provenance[0].backend == "torch"
        with pytest.raises(BackendUnavailable, match="channels are multiples of"):
            Engine.load(model, device="cpu", backend="native")

    def test_says_where_it_cannot_run(self, monkeypatch):
        backend = NativeBackend()
        assert backend.unavailable(CPU, "fp32") is None
        assert "not on cuda" in str(backend.unavailable(torch.device("cuda"), "fp32"))
        assert "not in bf16" in str(backend.unavailable(CPU, "bf16"))
        monkeypatch.setattr(native, "lacking", lambda folder: "it needs a wheel, or a C++ compiler")
        assert "C++ compiler" in str(backend.unavailable(CPU, "fp32"))

    def test_a_compiler_that_fails_leaves_it_to_others(self, tmp_path, monkeypatch, caplog):
        def fails(folder):
            raise OSError("no such header")

        monkeypatch.setattr(native, "load_library", fails)
        monkeypatch.setattr(native, "compiled_kernels", native.compiled_kernels.__wrapped__)
        model = write_model(tmp_path / "m", plans=plans())
        with pytest.raises(BackendUnavailable, match="cannot be compiled here: no such header"):
            Engine.load(model, device="cpu", backend="native")
        assert Engine.load(model, device="cpu").provenance[0].backend == "torch"
        assert "nnturbo's kernels cannot be compiled here: no such header" in caplog.text


def test_a_bundle_is_built_by_another_backend_where_the_kernels_cannot_run_the_network(tmp_path, monkeypatch):
    monkeypatch.setitem(choose.AUTOMATIC, "cpu", ("native", "torch"))
    model = write_model(tmp_path / "m", plans=plans_2d())
    bundle = build(model, tmp_path / "bundle", device="cpu")
    assert read_manifest(bundle).backend == "torch"
    assert Engine.load(bundle, device="cpu").provenance[0].backend == "torch"
    with pytest.raises(BackendUnavailable, match="channels are multiples of"):
        build(model, tmp_path / "other", device="cpu", backend="native")
    assert not (tmp_path / "other").exists()


def test_a_bundle_gives_the_labels_of_the_model(tmp_path):
    model = write_model(tmp_path / "m", plans=multi_task(plans()))
    bundle = build(model, tmp_path / "bundle", backend="native", device="cpu")
    scan = Volume.from_array(smooth_scan((12, 40, 50)), (2.0, 1.5, 1.5))
    one, other = (Engine.load(path, device="cpu", backend="native").predict(scan) for path in (model, bundle))
    assert np.array_equal(one.segmentation, other.segmentation)
    assert len(np.unique(one.segmentation)) > 1
    assert one.classification == other.classification
