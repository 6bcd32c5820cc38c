"""nnturbo-native: labels, class and exit status of scans in NIfTI of every kind."""

import json
import os
import shutil
import subprocess

import nibabel
import numpy as np
import pytest
from nnturbo.engine import Engine
from nnturbo.engine import build as build_bundle

from tests.cpp.factory import SHAPE
from tests.engine.factory import dataset_json, multi_task, plans_json, smooth_scan, write_model
from tests.kernels.libnnturbo.nifti import write_nifti

pytestmark = pytest.mark.thorough  # the program is built for half a minute
LARGEST_BYTES = 5_000_000
LONGEST_S = 300


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "m", plans=multi_task(plans_json()))
    return build_bundle(folder, folder.parent / "bundle", backend="native", device="cpu")


@pytest.fixture(scope="module")
def engine(bundle):
    return Engine.load(bundle, device="cpu")


@pytest.fixture(scope="session")
def command(built):
    def run(*arguments):
        words = [built / "libnnturbo" / "nnturbo-native", *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=LONGEST_S)

    return run


def test_the_program_is_small_and_needs_nothing(built):
    program = built / "libnnturbo" / "nnturbo-native"
    assert program.stat().st_size < LARGEST_BYTES
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    assert "not a dynamic executable" in linked.stdout + linked.stderr


def test_labels_and_class_are_pythons(command, bundle, engine, tmp_path):
    scan = write_nifti(tmp_path / "scan.nii.gz")
    result = command(bundle, scan, tmp_path / "out.nii.gz", "--threads", "2")
    assert (result.returncode, result.stderr) == (0, "")
    expected = engine.predict(scan)
    written = nibabel.load(tmp_path / "out.nii.gz")
    labels = np.asanyarray(written.dataobj).transpose(2, 1, 0)
    assert labels.dtype == np.uint8
    assert len(np.unique(labels)) > 1
    assert np.array_equal(labels, expected.segmentation)
    np.testing.assert_allclose(written.affine, nibabel.load(scan).affine, atol=1e-5)
    answer = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert answer["name"] == expected.classification.name
    assert list(answer["probabilities"].values()) == pytest.approx(expected.classification.probabilities, abs=1e-5)


def test_voxels_of_any_type(command, bundle, tmp_path):
    array = (smooth_scan(SHAPE) // 3).clip(0, 100)
    same = write_nifti(tmp_path / "same.nii", array)
    assert command(bundle, same, tmp_path / "same_out.nii", "--disable-tta").returncode == 0
    expected = np.asanyarray(nibabel.load(tmp_path / "same_out.nii").dataobj)
    for dtype in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"):
        for version, order in ((1, ">"), (2, "<"), (2, ">")):
            scan = write_nifti(tmp_path / "scan.nii", array.astype(dtype), version=version, order=order)
            result = command(bundle, scan, tmp_path / "out.nii", "--disable-tta")
            assert (result.returncode, result.stderr) == (0, "")
            written = nibabel.load(tmp_path / "out.nii")
            assert isinstance(written, nibabel.Nifti2Image) == (version == 2)
            assert np.array_equal(written.dataobj, expected), (dtype, version, order)


def test_slope_intercept_and_units(command, bundle, engine, tmp_path):
    scan = write_nifti(
        tmp_path / "scan.nii.gz", smooth_scan(SHAPE) * 2, scl_slope=0.5, scl_inter=-20.25, cal_max=400, descrip=b"name"
    )
    assert command(bundle, scan, tmp_path / "out.nii.gz").returncode == 0
    written = nibabel.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj).transpose(2, 1, 0), engine.predict(scan).segmentation)
    assert written.header.get_slope_inter() in ((None, None), (1, 0))
    assert (float(written.header["cal_max"]), bytes(written.header["descrip"]).strip(b"\0")) == (0, b"")


def test_channels_in_two_files(command, tmp_path):
    plans = plans_json(normalization_schemes=["ZScoreNormalization"] * 2, use_mask_for_norm=[True, False])
    dataset = dataset_json(channel_names={"0": "T1", "1": "T2"})
    folder = write_model(tmp_path / "m", plans=plans, dataset=dataset)
    bundle = build_bundle(folder, tmp_path / "bundle", backend="native", device="cpu")
    scans = [write_nifti(tmp_path / f"{i}.nii.gz", smooth_scan(SHAPE, i)) for i in range(2)]
    result = command(bundle, ",".join(map(str, scans)), tmp_path / "out.nii")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    labels = np.asanyarray(nibabel.load(tmp_path / "out.nii").dataobj).transpose(2, 1, 0)
    assert np.array_equal(labels, Engine.load(bundle, device="cpu").predict(scans).segmentation)
    other = patched(write_nifti(tmp_path / "other.nii"), {"qoffset_x": 50, "srow_x": [1, 0, 0, 50]})
    result = command(bundle, f"{scans[0]},{other}", tmp_path / "none.nii")
    assert (result.returncode, "must have the same shape, spacing, origin" in result.stderr) == (1, True)


WRONG_USAGE = {
    "": "must be given, got 0 path",
    "BUNDLE SCAN": "must be given, got 2 path",
    "BUNDLE SCAN OUT --fast": "there is no option --fast",
    "BUNDLE SCAN OUT --step-size": "--step-size needs a value",
    "BUNDLE SCAN OUT --step-size 3": "--step-size must be a number above 0 and up to 1",
    "BUNDLE SCAN OUT --threads x": "--threads must be a number above 0",
    "BUNDLE SCAN SCAN": "OUTPUT must be another file than INPUT",
    "EMPTY SCAN OUT": "must be a folder with engine.json",
}


@pytest.mark.parametrize("words", WRONG_USAGE)
def test_wrong_usage(words, command, bundle, tmp_path):
    paths = {
        "BUNDLE": bundle,
        "SCAN": write_nifti(tmp_path / "scan.nii"),
        "OUT": tmp_path / "out.nii",
        "EMPTY": tmp_path,
    }
    result = command(*[paths.get(word, word) for word in words.split()])
    assert (result.returncode, result.stdout) == (2, "")
    assert WRONG_USAGE[words] in result.stderr
    assert not (tmp_path / "out.nii").exists()


def test_help(command):
    result = command("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: nnturbo-native")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with named pipes")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(command, bundle, tmp_path):
    spoilt = shutil.copytree(bundle, tmp_path / "bundle")
    (spoilt / "path.json").unlink()
    os.mkfifo(spoilt / "path.json")
    result = command(spoilt, write_nifti(tmp_path / "scan.nii"), tmp_path / "out.nii")
    assert (result.returncode, "path.json: this file of the bundle cannot be read" in result.stderr) == (2, True)


SPOILT = {
    "cut off": ("scan.nii", {}, cut, "the file has less or is damaged"),
    "cut off, compressed": ("scan.nii.gz", {}, cut, "the file has less or is damaged"),
    "no NIfTI": ("scan.nii", {}, lambda path: path.write_bytes(b"x" * 1000), "its header is not one"),
    "empty": ("scan.nii", {}, lambda path: path.write_bytes(b""), "its header is not one"),
    "other ending": ("scan.nii", {}, lambda path: path.rename(path.with_suffix(".mha")), "there is no such file"),
    "spacing": ("scan.nii", {"pixdim": [1, 1, 0, 1, 1, 1, 1, 1]}, None, "spacing must be finite and above 0"),
    "complex": ("scan.nii", {"datatype": 32, "bitpix": 64}, None, "voxels must be plain integers or floats"),
    "4D": ("scan.nii", {"dim": [4, 26, 24, 3, 3, 1, 1, 1]}, None, "an image must be 3D"),
    "offset": ("scan.nii", {"vox_offset": 100}, None, "voxels must begin behind the header"),
    "huge": ("scan.nii", {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, None, "10^12 voxels"),
}


def patched(path, fields):
    """Change fields of the header of a .nii in place: nibabel would correct them."""
    content = bytearray(path.read_bytes())
    header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    content[:348] = header.binaryblock
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", SPOILT)
def test_scans_that_fail(kind, command, bundle, tmp_path):
    name, fields, spoil, message = SPOILT[kind]
    scan = write_nifti(tmp_path / name)
    if fields:
        patched(scan, fields)
    if spoil:
        spoil(scan)
    (tmp_path / "out").mkdir()
    result = command(bundle, scan, tmp_path / "out" / "out.nii.gz")
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_nifti_2_header_with_very_many_axes_is_refused(command, bundle, tmp_path):
    scan = write_nifti(tmp_path / "scan.nii", version=2)
    content = bytearray(scan.read_bytes())
    header = nibabel.Nifti2Header(bytes(content[:540]), check=False)
    header["dim"][0] = 10**6
    content[:540] = header.binaryblock
    scan.write_bytes(content)
    result = command(bundle, scan, tmp_path / "out.nii")
    assert (result.returncode, "an image must be 3D, got 1000000 axes" in result.stderr) == (1, True)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_takes_no_file(command, bundle, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    result = command(bundle, write_nifti(tmp_path / "scan.nii"), tmp_path / "out" / "out.nii")
    assert (result.returncode, "cannot be written" in result.stderr) == (1, True)


def test_labels_replace_those_before_and_a_missing_folder_is_said(command, bundle, tmp_path):
    scan, out = write_nifti(tmp_path / "scan.nii"), tmp_path / "out.nii"
    out.write_bytes(b"before")
    assert command(bundle, scan, out).returncode == 0
    assert nibabel.load(out).shape == SHAPE[::-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.nii", "scan.nii"]
    result = command(bundle, scan, tmp_path / "none" / "out.nii")
    assert (result.returncode, "cannot be written" in result.stderr) == (1, True)
