"""The C++ library in examples/cpp, by way of its command, against Python."""

import json
import re
import subprocess
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import Engine
from nnturbo.engine import build as build_bundle
from nnturbo.engine.export.scripted.path import CaseState, scan_path
from nnturbo.engine.model.folder import read_model
from torch import Tensor, nn

from tests.cpp.factory import SHAPE, SOURCE, cmake, write_manifest, write_scan
from tests.engine.factory import dataset_json, plans_2d, plans_json, random_weights, smooth_scan, write_model

pytestmark = pytest.mark.thorough  # the C++ library is built for a minute


class DictionaryPath(nn.Module):
    """A path like those of earlier versions: the state of a case is a dictionary of tensors."""

    class_names: list[str]
    label_names: list[str]
    states: list[CaseState]

    def __init__(self, path):
        super().__init__()
        self.path, self.states = path, []
        self.class_names, self.label_names, self.channels = path.class_names, path.label_names, path.channels

    @torch.jit.export
    def start(self, image: Tensor, spacing: list[float], tile_step_size: float, mirror: bool) -> dict[str, Tensor]:
        self.states.append(self.path.start(image, spacing, tile_step_size, mirror))
        return {"tiles": self.states[-1].tiles}

    @torch.jit.export
    def views(self, state: dict[str, Tensor], tile: int) -> Tensor:
        return self.path.views(self.states[-1], tile)

    @torch.jit.export
    def add(
        self, state: dict[str, Tensor], tile: int, seg_logits: Tensor, class_logits: Tensor | None
    ) -> dict[str, Tensor]:
        self.states[-1] = self.path.add(self.states[-1], tile, seg_logits, class_logits)
        return state

    @torch.jit.export
    def finish(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.path.finish(self.states[-1])


def expect_labels(output, expected):
    """Check that a file has the labels and the geometry of a prediction in Python."""
    image = sitk.ReadImage(str(output))
    labels = sitk.GetArrayFromImage(image)
    assert labels.dtype == np.uint8
    assert len(np.unique(labels)) > 1
    assert np.array_equal(labels, expected.segmentation)
    assert image.GetSpacing() == pytest.approx(expected.geometry.spacing[::-1], rel=1e-6)
    assert image.GetOrigin() == pytest.approx(expected.geometry.origin, abs=1e-5)
    assert image.GetDirection() == pytest.approx(expected.geometry.direction, abs=1e-6)


def expect_class(result, expected):
    answer = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert answer["label"] == expected.label
    assert answer["name"] == expected.name
    assert list(answer["probabilities"]) == list(expected.class_names)
    assert list(answer["probabilities"].values()) == pytest.approx(expected.probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "options"),
    [([], {}), (["--step-size", "1", "--disable-tta", "--device", "cpu"], {"tile_step_size": 1.0, "mirror": False})],
)
def test_labels_and_class_are_those_of_python(command, bundle, model, scan, tmp_path, flags, options):
    result = command(bundle, scan, tmp_path / "out.nii.gz", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    expected = Engine.load(model, device="cpu", backend="torch", **options).predict(scan)
    expect_labels(tmp_path / "out.nii.gz", expected)
    expect_class(result, expected.classification)


@pytest.mark.parametrize(
    ("flags", "options"), [([], {}), (["--step-size", "1", "--disable-tta"], {"tile_step_size": 1.0, "mirror": False})]
)
def test_a_native_bundle_gives_the_labels_of_python(command, native_bundle, scan, tmp_path, flags, options):
    result = command(native_bundle, scan, tmp_path / "out.nii.gz", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    expected = Engine.load(native_bundle, device="cpu", **options).predict(scan)
    expect_labels(tmp_path / "out.nii.gz", expected)
    expect_class(result, expected.classification)


@pytest.mark.parametrize("backend", ["torchscript", "native"])
def test_many_labels(command, backend, tmp_path):
    labels = {"background": 0, **{f"label {value}": value for value in range(1, 320)}}
    plans, dataset = plans_json(), dataset_json(labels=labels)
    weights = random_weights(plans, dataset)
    model = write_model(tmp_path / "model", plans=plans, dataset=dataset, checkpoint={"network_weights": weights})
    bundle = build_bundle(model, tmp_path / "bundle", backend=backend, device="cpu")
    scan = write_scan(tmp_path / "scan.nii.gz", smooth_scan(SHAPE))
    result = command(bundle, scan, tmp_path / "out.nii")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.nii")))
    assert written.dtype == np.uint16
    assert written.max() > 255
    assert np.array_equal(written, Engine.load(bundle, device="cpu").predict(scan).segmentation)


@pytest.mark.slow  # compiles a network for half a minute
def test_a_compiled_network_gives_the_labels_of_python(command, model, scan, tmp_path):
    bundle = build_bundle(model, tmp_path / "compiled", backend="inductor", device="cpu")
    result = command(bundle, scan, tmp_path / "out.nii.gz")
    assert (result.returncode, result.stderr) == (0, "")
    expected = Engine.load(model, device="cpu", backend="torch").predict(scan)
    expect_labels(tmp_path / "out.nii.gz", expected)
    expect_class(result, expected.classification)


def test_a_path_with_a_dictionary_as_its_state_runs_too(command, own_bundle, model, scan, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
        read = read_model(model)
        torch.jit.script(DictionaryPath(scan_path(read.plan, read.mirror_axes))).save(str(own_bundle / "path.ts"))
    write_manifest(own_bundle)
    result = command(own_bundle, scan, tmp_path / "out.nii.gz")
    assert (result.returncode, result.stderr) == (0, "")
    expected = Engine.load(model, device="cpu", backend="torch").predict(scan)
    expect_labels(tmp_path / "out.nii.gz", expected)
    expect_class(result, expected.classification)


@pytest.mark.parametrize("kind", ["two channels", "slices"])
def test_other_kinds_of_models(command, tmp_path, kind):
    plans, dataset, count = plans_2d(), dataset_json(), 1
    if kind == "two channels":
        schemes = {"normalization_schemes": ["ZScoreNormalization"] * 2, "use_mask_for_norm": [True, False]}
        plans, dataset, count = plans_json(**schemes), dataset_json(channel_names={"0": "T1", "1": "T2"}), 2
    weights = random_weights(plans, dataset, seed=3 * (count - 1))  # seeds that give several labels
    model = write_model(tmp_path / "model", plans=plans, dataset=dataset, checkpoint={"network_weights": weights})
    bundle = build_bundle(model, tmp_path / "bundle", backend="torchscript", device="cpu")
    scans = [write_scan(tmp_path / f"scan_{i}.nii.gz", smooth_scan(SHAPE, seed=i)) for i in range(count)]
    result = command(bundle, ",".join(map(str, scans)), tmp_path / "out.nii")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    expect_labels(tmp_path / "out.nii", Engine.load(model, device="cpu", backend="torch").predict(scans))


@pytest.mark.parametrize(
    ("dtype", "header"),
    [
        (np.int16, {"scl_slope": 0.5, "scl_inter": -20.25}),
        (np.float32, {}),
        (np.float64, {}),
        (np.int32, {}),
        (np.uint16, {}),
        (np.uint8, {"scl_slope": 2, "scl_inter": -100}),
    ],
)
def test_voxels_are_read_as_simpleitk_reads_them(command, bundle, model, tmp_path, dtype, header):
    array = smooth_scan(SHAPE).clip(0, 250) if np.dtype(dtype).kind == "u" else smooth_scan(SHAPE)
    scan = write_scan(tmp_path / "scan.nii.gz", array.astype(dtype), **header)
    assert command(bundle, scan, tmp_path / "out.nii.gz").returncode == 0
    expect_labels(tmp_path / "out.nii.gz", Engine.load(model, device="cpu", backend="torch").predict(scan))


def test_bytes_in_the_other_order_are_swapped(command, bundle, scan, tmp_path):
    image = nibabel.load(scan)
    big_endian = nibabel.Nifti1Image(
        np.asanyarray(image.dataobj), image.affine, nibabel.Nifti1Header.from_header(image.header).as_byteswapped(">")
    )
    nibabel.save(big_endian, tmp_path / "big.nii")
    assert command(bundle, scan, tmp_path / "little_out.nii").returncode == 0
    assert command(bundle, tmp_path / "big.nii", tmp_path / "big_out.nii").returncode == 0
    expected, found = (nibabel.load(tmp_path / f"{name}_out.nii").get_fdata() for name in ("little", "big"))
    assert np.array_equal(found, expected)


def test_the_scans_header_is_kept_and_its_scaling_is_not(command, bundle, tmp_path):
    header = {"scl_slope": 0.5, "scl_inter": -20, "cal_max": 400, "descrip": b"patient", "qform_code": 1}
    scan = write_scan(tmp_path / "scan.nii.gz", smooth_scan(SHAPE), **header)
    assert command(bundle, scan, tmp_path / "out.nii.gz").returncode == 0
    given, written = nibabel.load(scan).header, nibabel.load(tmp_path / "out.nii.gz").header
    for kept in ("dim", "pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "qoffset_x", "xyzt_units"):
        assert np.array_equal(written[kept], given[kept]), kept
    assert np.array_equal(written.get_qform(), given.get_qform())
    assert written.get_slope_inter() in ((None, None), (1, 0))
    assert [int(written[field]) for field in ("datatype", "bitpix", "cal_max")] == [2, 8, 0]
    assert bytes(written["descrip"]).strip(b"\0") == b""


@pytest.mark.slow  # compiles the README's program and another for a minute
def test_programs_embed_the_installed_library(built, bundle, native_bundle, tmp_path):
    subprocess.run(["cmake", "--install", built, "--prefix", tmp_path / "prefix"], capture_output=True, check=True)
    installed = [tmp_path / "prefix" / "bin" / "nnturbo_predict", "--help"]
    assert subprocess.run(installed, capture_output=True, text=True, check=True).stdout.startswith("usage:")
    readme = (SOURCE / "README.md").read_text()
    (program,) = re.findall(r"```cpp\n(.*?)```", readme, re.DOTALL)
    (project,) = re.findall(r"```cmake\n(.*?)```", readme, re.DOTALL)
    source = tmp_path / "program"
    source.mkdir()
    (source / "main.cpp").write_text(program)
    (source / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.18)\nproject(mine CXX)\n{project}"
        f"add_executable(embedding {Path(__file__).with_name('embedding.cpp')})\n"
        "target_link_libraries(embedding PRIVATE nnturbo_torch::nnturbo_torch)\n"
    )
    cmake(source, tmp_path / "built", tmp_path / "prefix")
    for opened in (bundle, native_bundle):
        result = subprocess.run([tmp_path / "built" / "mine", opened], capture_output=True, text=True, check=True)
        assert "labels of [64, 128, 128]" in result.stdout
        command = [tmp_path / "built" / "embedding", opened]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
