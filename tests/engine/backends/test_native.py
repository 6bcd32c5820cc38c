"""The native backend: torch's logits from nnturbo's own kernels, for the networks that it takes."""

import copy
import math

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, Engine, Volume, build
from nnturbo.engine.backends import choose, native, native_builder
from nnturbo.engine.backends.buffers import reads
from nnturbo.engine.backends.native import NativeBackend
from nnturbo.engine.backends.native_files import PROGRAM_FILE, WEIGHTS_FILE, read_programs
from nnturbo.engine.backends.torch import TorchBackend
from nnturbo.engine.bundles.manifest import read_manifest
from nnturbo.engine.errors import BundleError
from nnturbo.engine.model.folder import read_model

from tests.engine.factory import multi_task, plans_2d, plans_json, smooth_scan, write_model, write_scan

CPU = torch.device("cpu")
MISSING = NativeBackend().unavailable(CPU, "fp32")
NO_INT16 = MISSING or NativeBackend().unavailable(CPU, "int16")
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
    return made


def with_bottlenecks(made):
    architecture = made["configurations"]["3d_fullres"]["architecture"]
    architecture["arch_kwargs"] |= {
        "block": "dynamic_network_architectures.building_blocks.residual.BottleneckD",
        "bottleneck_channels": [8, 12, 16],
    }
    architecture["_kw_requires_import"].append("block")
    return made


def in_2d(made):
    configuration = made["configurations"]["3d_fullres"]
    arguments = configuration["architecture"]["arch_kwargs"]
    configuration |= {"patch_size": configuration["patch_size"][1:], "spacing": configuration["spacing"][1:]}
    arguments |= {key: [each[1:] for each in arguments[key]] for key in ("kernel_sizes", "strides")}
    arguments |= {"conv_op": "torch.nn.Conv2d", "norm_op": "torch.nn.InstanceNorm2d"}
    return made


KINDS = {
    "plain": plans(),
    "residual encoder": plans("ResidualEncoderUNet"),
    "multi-task": multi_task(plans(), kind="attention"),
    "relu, without biases": plans(nonlin="torch.nn.ReLU", conv_bias=False),
    "odd sizes": plans(patch=(6, 20, 36)),
    "residual": plans("ResidualUNet"),
    "bottlenecks": with_bottlenecks(plans("ResidualEncoderUNet")),
    "odd channels": plans(features_per_stage=[5, 19, 37]),
    "2D": in_2d(plans(features_per_stage=[12, 32, 64])),
    "2D residual encoder": in_2d(plans("ResidualEncoderUNet", features_per_stage=[12, 32, 64])),
    "2D multi-task": multi_task(in_2d(plans()), kind="attention", stages=[0, 2]),
    "average": multi_task(plans(), kind="gap_linear", stages=[0, 2]),
    "average, two layers": multi_task(plans(), kind="gap_mlp", stages=[1]),
    "wide": plans(features_per_stage=[32, 64, 128], n_conv_per_stage=[1, 1, 3]),
}

USUAL_KINDS = ("plain", "residual encoder", "2D", "wide")

UNSUITED = plans(norm_op=None, norm_op_kwargs=None)


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        *((kind, 1) for kind in KINDS),
        *(
            pytest.param(kind, native_builder.LEAST_VOXELS, marks=() if kind in USUAL_KINDS else pytest.mark.thorough)
            for kind in KINDS
        ),
    ],
)
def test_logits_are_those_of_torch_for_any_number_of_tiles(tmp_path, monkeypatch, kind, least):
    monkeypatch.setattr(native_builder, "LEAST_VOXELS", least)
    monkeypatch.setattr(native_builder, "LEAST_VOXELS_OF_PLANES", least)
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


@pytest.mark.parametrize(("kind", "maps"), [("plain", 2), ("residual encoder", 3), ("average", 3)])
def test_memory_is_that_of_few_maps_of_the_finest_stage(tmp_path, monkeypatch, kind, maps):
    """Convolutions write over what nothing reads later; a skip connection needs a map of its own."""
    monkeypatch.setattr(native_builder, "LEAST_VOXELS", 1)
    model = read_model(write_model(tmp_path / "m", plans=KINDS[kind]))
    program = NativeBackend().load(model, None, CPU, "fp32")._folds[0].executor.program
    later = [each for each in program.operations if each.name.endswith(("convs.1", "conv2"))]
    over = [program.values[each.output].buffer == program.values[each.inputs[-1]].buffer for each in later]
    assert over
    assert all(over)
    holds, numbers = {program.values[0].buffer: 0}, {}
    for operation in program.operations:
        assert all(holds[program.values[value].buffer] == value for value in reads(operation))
        holds[program.values[operation.output].buffer] = operation.output
    for value in program.values[:-1]:
        numbers[value.buffer] = max(numbers.get(value.buffer, 0), value.channels * math.prod(value.size))
    finest = program.values[1]
    assert sum(numbers.values()) <= maps * finest.channels * math.prod(finest.size)


def test_several_folds_are_averaged(tmp_path):
    model = read_model(write_model(tmp_path / "m", plans=plans(), folds=("0", "1")))
    tile = torch.randn(1, 1, *model.plan.patch_size, generator=torch.Generator().manual_seed(0))
    expected = TorchBackend().load(model, None, CPU, "fp32")(tile).seg_logits
    got = NativeBackend().load(model, None, CPU, "fp32")(tile).seg_logits
    assert float((got - expected).abs().max()) < 3e-4 * float(expected.std())


def test_what_comes_from_the_encoder_is_not_copied(tmp_path):
    model = read_model(write_model(tmp_path / "m", plans=plans(patch=(16, 48, 64))))
    operations = NativeBackend().load(model, None, CPU, "fp32")._folds[0].executor.program.operations
    assert {operation.kind for operation in operations} == {"convolution", "projection"}


class TestChoice:
    @pytest.fixture(autouse=True)
    def automatic(self, monkeypatch):
        monkeypatch.setitem(choose.AUTOMATIC, "cpu", ("native", "torch"))

    @pytest.mark.parametrize("suited", [plans(), plans_json(), plans_2d()])
    def test_auto_takes_it_for_networks_that_suit_it(self, tmp_path, suited):
        model = write_model(tmp_path / "m", plans=copy.deepcopy(suited))
        assert Engine.load(model, device="cpu").provenance[0].backend == "native"

    @pytest.mark.parametrize("unsuited", [plans(norm_op="torch.nn.BatchNorm3d"), UNSUITED])
    def test_auto_takes_another_one_for_others(self, tmp_path, unsuited):
        model = write_model(tmp_path / "m", plans=copy.deepcopy(unsuited))
        assert Engine.load(model, device="cpu").provenance[0].backend == "torch"
        with pytest.raises(BackendUnavailable, match="no instance norm|no convolution with norm"):
            Engine.load(model, device="cpu", backend="native")

    def test_says_where_it_cannot_run(self, monkeypatch):
        backend = NativeBackend()
        assert backend.unavailable(CPU, "fp32") is None
        assert "not on cuda" in str(backend.unavailable(torch.device("cuda"), "fp32"))
        assert "not in bf16" in str(backend.unavailable(CPU, "bf16"))
        monkeypatch.setattr(native, "multiplies_int16", lambda library: False)
        assert "no int16 products (AVX512-VNNI); use fp32" in str(backend.unavailable(CPU, "int16"))
        monkeypatch.setattr(native, "lacking", lambda folder: "it needs a wheel, or a C++ compiler")
        assert "C++ compiler" in str(backend.unavailable(CPU, "fp32"))
        assert "C++ compiler" in str(backend.unavailable(CPU, "int16"))

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
    model = write_model(tmp_path / "m", plans=copy.deepcopy(UNSUITED))
    bundle = build(model, tmp_path / "bundle", device="cpu")
    assert read_manifest(bundle).backend == "torch"
    assert Engine.load(bundle, device="cpu").provenance[0].backend == "torch"
    with pytest.raises(BackendUnavailable, match="no instance norm|no convolution with norm"):
        build(model, tmp_path / "other", device="cpu", backend="native")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "multi-task",
        *(
            pytest.param(kind, marks=pytest.mark.thorough)
            for kind in ("average, two layers", "2D multi-task", "residual encoder")
        ),
    ],
)
def test_a_bundle_gives_the_labels_of_the_model(tmp_path, kind):
    model = write_model(tmp_path / "m", plans=KINDS[kind], folds=("0", "1"))
    bundle = build(model, tmp_path / "bundle", backend="native", device="cpu")
    assert {PROGRAM_FILE, WEIGHTS_FILE} <= {path.name for path in bundle.iterdir()}
    scan = Volume.from_array(smooth_scan((12, 40, 50)), (2.0, 1.5, 1.5))
    how = {"device": "cpu", "backend": "native", "mirror": False}
    one, other = (Engine.load(path, **how).predict(scan) for path in (model, bundle))
    assert np.array_equal(one.segmentation, other.segmentation)
    assert len(np.unique(one.segmentation)) > 1
    assert one.classification == other.classification


@pytest.mark.skipif(NO_INT16 is not None, reason=str(NO_INT16))
class TestInt16:
    @pytest.mark.parametrize("kind", ["multi-task", "2D multi-task", "residual encoder"])
    def test_logits_are_near_those_of_fp32(self, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(native_builder, "LEAST_VOXELS", 64)
        monkeypatch.setattr(native_builder, "LEAST_VOXELS_OF_PLANES", 64)
        model = read_model(write_model(tmp_path / "m", plans=KINDS[kind]))
        tiles = torch.randn(2, 1, *model.plan.patch_size, generator=torch.Generator().manual_seed(0))
        exact, near = (NativeBackend().load(model, None, CPU, precision)(tiles) for precision in ("fp32", "int16"))
        spread = float(exact.seg_logits.std())
        assert 0 < float((near.seg_logits - exact.seg_logits).square().mean().sqrt()) < 0.02 * spread
        torch.testing.assert_close(near.class_logits, exact.class_logits, atol=0.02, rtol=0.02)

    def test_a_bundle_gives_the_labels_of_the_model_and_says_how_far_they_agree(self, tmp_path):
        model = write_model(tmp_path / "m", plans=KINDS["multi-task"], folds=("0", "1"))
        scan = write_scan(tmp_path / "scan.nii.gz", shape=(12, 40, 50))
        how = {"device": "cpu", "backend": "native", "precision": "int16"}
        bundle = build(model, tmp_path / "bundle", calibration=[scan], floor=0.9, **how)
        manifest = read_manifest(bundle)
        assert (manifest.backend, manifest.precision) == ("native", "int16")
        assert manifest.agreement.lowest_dice > 0.9
        operations = read_programs(bundle)[0].operations
        assert [each.in_int16 for each in operations[:2]] == [False, True]  # the tile's, and the next one
        assert not operations[-1].in_int16
        one, other = (Engine.load(model, **how).predict(scan), Engine.load(bundle, device="cpu").predict(scan))
        assert np.array_equal(one.segmentation, other.segmentation)
        assert one.provenance[0].precision == other.provenance[0].precision == "int16"


def test_a_bundle_with_damaged_files_is_refused(tmp_path):
    model = read_model(write_model(tmp_path / "m", plans=plans()))
    tile = torch.zeros(2, 1, *model.plan.patch_size)
    NativeBackend().build(model, tile, "fp32", tmp_path)
    unharmed = {name: (tmp_path / name).read_bytes() for name in (PROGRAM_FILE, WEIGHTS_FILE)}
    for name, before, after, reason in [
        (PROGRAM_FILE, b'"format": 1', b'"format": 2', "it has format 2"),
        (PROGRAM_FILE, b'"values"', b'"numbers"', "'values'"),
        (PROGRAM_FILE, b'"inputs": [\n    1\n', b'"inputs": [\n    9\n', "reads value 9, which is not there then"),
        (WEIGHTS_FILE, b"F32", b"F16", "a tensor of F16"),
        (WEIGHTS_FILE, b"convs.0.weight", b"convs.9.weight", "convs.0.weight"),
    ]:
        for each, content in unharmed.items():
            (tmp_path / each).write_bytes(content)
        assert before in unharmed[name]
        (tmp_path / name).write_bytes(unharmed[name].replace(before, after, 1))
        with pytest.raises(BundleError, match=reason):
            NativeBackend().load(model, tmp_path, CPU, "fp32")
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        NativeBackend().load(model, tmp_path, CPU, "fp32")
