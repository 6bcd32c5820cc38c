"""The C++ library in examples/cpp, by way of its command, against Python."""

import hashlib
import json
import platform
import re
import shutil
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

from tests.cpp.conftest import SOURCE, cmake
from tests.engine.factory import (
    dataset_json,
    multi_task,
    plans_2d,
    plans_json,
    random_weights,
    smooth_scan,
    write_model,
)

SHAPE = (9, 24, 26)


def write_manifest(folder, **changes):
    """Change entries of a bundle's manifest, with the hashes of the files as they are now."""
    manifest = json.loads((folder / "engine.json").read_text())
    manifest["files"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != "engine.json"
    }
    (folder / "engine.json").write_text(json.dumps(manifest | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("multi_task") / "m", plans=multi_task(plans_json()), folds=("0", "1"))


@pytest.fixture(scope="module")
def bundle(model):
    return build_bundle(model, model.parent / "bundle", backend="torchscript", device="cpu")


@pytest.fixture
def own_bundle(bundle, tmp_path):
    """A bundle to spoil."""
    return shutil.copytree(bundle, tmp_path / "spoilt")


def write_scan(path, array, *, spacing=(1.2, 1.1, 3.0), **header):
    """Write (Z, Y, X) with a tilted direction; `header` sets fields afterwards."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin((-10.5, 20.25, 30.125))
    image.SetDirection((0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))
    if header:
        image = nibabel.load(path)
        raw = np.asanyarray(image.dataobj)
        changed = nibabel.Nifti1Image(raw, None, image.header)
        for field, value in header.items():
            changed.header[field] = value
        changed.header.set_slope_inter(header.get("scl_slope", 1), header.get("scl_inter", 0))
        nibabel.save(changed, path)
    return path


@pytest.fixture
def scan(tmp_path):
    return write_scan(tmp_path / "scan.nii.gz", smooth_scan(SHAPE))


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


@pytest.mark.slow  # compiles a network for half a minute
def test_a_compiled_network_gives_the_labels_of_python(command, model, scan, tmp_path):
    bundle = build_bundle(model, tmp_path / "compiled", backend="inductor", device="cpu")
    result = command(bundle, scan, tmp_path / "out.nii.gz")
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


# ---- bundles that cannot be used: exit status 2 ----------------------------------------------------------------------


def expect_failure(command, status, text, bundle, scan, output, *flags, **environment):
    result = command(bundle, scan, output, *flags, **environment)
    assert result.returncode == status, result.stderr
    assert re.search(text, result.stderr), result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("nnturbo_predict: ")
    assert result.stderr.count("\n") == 1
    assert not Path(output).exists()
    assert not list(Path(output).parent.glob(".writing-*"))


MANIFESTS = {
    "newer schema": ({"schema": 2}, "has schema 2: a newer nnturbo made it; update"),
    "no schema": ({"schema": 0}, "schema must be 1, it is 0"),
    "schema of another type": ({"schema": "one"}, "in the form that nnturbo writes"),
    "another backend": (
        {"backend": "openvino"},
        "this one's is openvino; build one with `nnturbo build .*torchscript`",
    ),
    "without the path": ({"files": {"network.ts": "00"}}, "must name path.ts"),
    "without the network": ({"files": {"path.ts": "00"}}, "must name network.ts"),
    "for CUDA": (
        {"machine": {"device": "cuda", "architecture": "x86_64", "cpu": "AVX2"}},
        "built for device cuda, it cannot run on cpu",
    ),
    "without a machine": ({"machine": None}, "in the form that nnturbo writes"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_do_not_suit(command, own_bundle, scan, tmp_path, name):
    changes, text = MANIFESTS[name]
    write_manifest(own_bundle, **changes)
    expect_failure(command, 2, text, own_bundle, scan, tmp_path / "out.nii.gz")


def test_a_folder_that_is_no_bundle(command, model, scan, tmp_path):
    expect_failure(command, 2, "engine.json, and there is none; make", model, scan, tmp_path / "out.nii.gz")


def test_a_manifest_that_is_not_json(command, own_bundle, scan, tmp_path):
    (own_bundle / "engine.json").write_text('{"schema": 1')
    expect_failure(command, 2, "this is not JSON", own_bundle, scan, tmp_path / "out.nii.gz")


def test_a_manifest_cannot_name_files_elsewhere(command, own_bundle, scan, tmp_path):
    manifest = json.loads((own_bundle / "engine.json").read_text())
    write_manifest(own_bundle, files={**manifest["files"], "../scan.nii.gz": "00"})
    expect_failure(command, 2, "files in the bundle itself, it names", own_bundle, scan, tmp_path / "out.nii.gz")


@pytest.mark.parametrize("file", ["network.ts", "path.ts"])
def test_files_that_were_changed_cut_off_or_lost(command, own_bundle, scan, tmp_path, file):
    content = (own_bundle / file).read_bytes()
    for spoilt in (content[:-1], content[:1000] + b"?" + content[1001:]):
        (own_bundle / file).write_bytes(spoilt)
        expect_failure(command, 2, f"{file}: its SHA-256 must be", own_bundle, scan, tmp_path / "out.nii.gz")
    (own_bundle / file).unlink()
    expect_failure(command, 2, f"{file}: .*it is not there", own_bundle, scan, tmp_path / "out.nii.gz")


@pytest.mark.parametrize(("backend", "file"), [("torchscript", "network.ts"), ("inductor", "network.pt2")])
def test_a_network_that_was_damaged_before_it_was_hashed(command, own_bundle, scan, tmp_path, backend, file):
    (own_bundle / file).write_bytes(b"not a network")
    write_manifest(own_bundle, backend=backend)
    text = f"{file}: libtorch {torch.__version__.partition('+')[0]} cannot load"
    expect_failure(command, 2, text, own_bundle, scan, tmp_path / "out.nii.gz")


def test_code_compiled_for_another_machine(command, own_bundle, scan, tmp_path):
    (own_bundle / "network.pt2").write_bytes(b"machine code")
    here = {"device": "cpu", "architecture": platform.machine(), "cpu": "AVX2"}
    write_manifest(own_bundle, backend="inductor", machine={**here, "architecture": "riscv64"})
    expect_failure(command, 2, "compiled for riscv64", own_bundle, scan, tmp_path / "out.nii.gz")
    write_manifest(own_bundle, backend="inductor", machine=here)
    expect_failure(
        command,
        2,
        f"{platform.machine()} AVX2, this machine is",
        own_bundle,
        scan,
        tmp_path / "out.nii.gz",
        ATEN_CPU_CAPABILITY="default",
    )


def test_code_compiled_with_another_torch(command, own_bundle, scan, tmp_path):
    (own_bundle / "network.pt2").write_bytes(b"machine code")
    write_manifest(own_bundle, backend="inductor", versions={"torch": "2.5.1+cpu"})
    expect_failure(command, 2, "compiled with torch 2.5.1, this program", own_bundle, scan, tmp_path / "out.nii.gz")


def test_a_device_that_is_not_there(command, own_bundle, scan, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    write_manifest(own_bundle, machine={"device": "cuda", "architecture": platform.machine()})
    expect_failure(command, 2, "device cuda is not there", own_bundle, scan, tmp_path / "o.nii.gz", "--device", "cuda")


def test_wrong_usage(command):
    for words, text in (
        ([], "got 0 path"),
        (["a", "b", "c", "d"], "got 4 path"),
        (["a", "b", "c", "--fast"], "no option --fast"),
        (["a", "b", "c", "--device"], "--device needs a value"),
        (["a", "b", "c", "--device", "toaster"], "--device must be"),
        *((["a", "b", "c", "--step-size", size], "--step-size must be") for size in ("0", "1.5", "half", "1x", "nan")),
    ):
        result = command(*words)
        assert result.returncode == 2
        assert text in result.stderr
        assert "usage: nnturbo_predict BUNDLE" in result.stderr
    assert command("--help").returncode == 0
    assert command("--help").stdout.startswith("usage: nnturbo_predict BUNDLE")


# ---- scans that cannot be used: exit status 1 ------------------------------------------------------------------------


def spoil_header(path, offset, content):
    """Replace bytes of an uncompressed copy of a scan."""
    copy = path.with_name("spoilt.nii")
    sitk.WriteImage(sitk.ReadImage(str(path)), str(copy))
    raw = bytearray(copy.read_bytes())
    raw[offset : offset + len(content)] = content
    copy.write_bytes(raw)
    return copy


def test_scans_that_cannot_be_read(command, bundle, scan, tmp_path):
    output = tmp_path / "out.nii.gz"
    expect_failure(command, 1, "there is no such file", bundle, tmp_path / "none.nii.gz", output)
    expect_failure(command, 1, r"must end with \.nii\.gz or \.nii", bundle, tmp_path / "scan.mha", output)
    expect_failure(command, 1, "at least one file", bundle, "", output)
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(scan.read_bytes()[:-3000])
    expect_failure(command, 1, "bytes of voxels, and the file has less", bundle, cut, output)
    cut.write_bytes(b"nothing")
    expect_failure(command, 1, "its header is not one", bundle, cut, output)
    complex_voxels = np.frombuffer(np.int16([32]).tobytes(), np.uint8).tobytes()
    expect_failure(command, 1, "got COMPLEX64", bundle, spoil_header(scan, 70, complex_voxels), output)
    for step in (0.0, -1.0, float("nan")):
        spoilt = spoil_header(scan, 80, np.float32(step).tobytes())
        expect_failure(command, 1, "spacing must be finite and above 0", bundle, spoilt, output)


def test_scans_that_do_not_suit(command, bundle, scan, tmp_path):
    output = tmp_path / "out.nii.gz"
    film = tmp_path / "film.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 20, 9, 2), np.int16), np.eye(4)), film)
    expect_failure(command, 1, "must be 3D, got 4D", bundle, film, output)
    expect_failure(command, 1, r"takes 1 channel\(s\), got 2", bundle, f"{scan},{scan}", output)
    other = write_scan(tmp_path / "other.nii.gz", smooth_scan(SHAPE), spacing=(1.2, 1.1, 2.0))
    expect_failure(command, 1, "all channels must have the same shape", bundle, f"{scan},{other}", output)
    array = smooth_scan(SHAPE).astype(np.float32)
    array[3, 4, 5] = np.nan
    spoilt = write_scan(tmp_path / "nan.nii.gz", array)
    expect_failure(command, 1, "voxels must be finite", bundle, spoilt, output)


def test_a_network_that_fails_or_gives_no_numbers(command, own_bundle, scan, tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, tiles):
            return tiles.repeat(1, 3, 1, 1, 1) * torch.nan, torch.zeros(len(tiles), 3)

    class Narrow(torch.nn.Module):
        def forward(self, tiles):
            return tiles, torch.zeros(len(tiles), 3)

    for network, text in ((Broken(), "logits must be finite"), (Narrow(), "seg_logits must be")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that torch.jit is deprecated
            torch.jit.script(network).save(str(own_bundle / "network.ts"))
        write_manifest(own_bundle)
        text = f"the prediction failed: .*{text}"
        expect_failure(command, 1, text, own_bundle, scan, tmp_path / "out.nii.gz")


def test_labels_do_not_take_the_place_of_their_scan(command, bundle, scan):
    before = scan.read_bytes()
    result = command(bundle, scan, scan)
    assert result.returncode == 2
    assert "OUTPUT must be another file than INPUT" in result.stderr
    assert scan.read_bytes() == before


def test_outputs_that_cannot_be_written(command, bundle, scan, tmp_path):
    expect_failure(command, 1, "No such file or directory", bundle, scan, tmp_path / "nowhere" / "out.nii.gz")
    expect_failure(command, 1, r"must end with \.nii\.gz or \.nii", bundle, scan, tmp_path / "out.nrrd")
    (tmp_path / "folder.nii.gz").mkdir()
    result = command(bundle, scan, tmp_path / "folder.nii.gz")
    assert result.returncode == 1
    assert not list(tmp_path.glob(".writing-*"))


# ---- embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # compiles the README's program and another for a minute
def test_programs_embed_the_installed_library(built, bundle, tmp_path):
    subprocess.run(["cmake", "--install", built, "--prefix", tmp_path / "prefix"], capture_output=True, check=True)
    assert (tmp_path / "prefix" / "bin" / "nnturbo_predict").is_file()
    readme = (SOURCE / "README.md").read_text()
    (program,) = re.findall(r"```cpp\n(.*?)```", readme, re.DOTALL)
    (project,) = re.findall(r"```cmake\n(.*?)```", readme, re.DOTALL)
    source = tmp_path / "program"
    source.mkdir()
    (source / "main.cpp").write_text(program)
    (source / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.18)\nproject(mine CXX)\n{project}"
        f"add_executable(embedding {Path(__file__).with_name('embedding.cpp')})\n"
        "target_link_libraries(embedding PRIVATE nnturbo::nnturbo)\n"
    )
    cmake(source, tmp_path / "built", tmp_path / "prefix")
    result = subprocess.run([tmp_path / "built" / "mine", bundle], capture_output=True, text=True, check=True)
    assert "labels of [64, 128, 128]" in result.stdout
    result = subprocess.run([tmp_path / "built" / "embedding", bundle], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
