"""What the C++ command refuses: bundles that cannot be used (exit status 2), and scans that cannot (1)."""

import json
import platform
import re
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from tests.cpp.factory import SHAPE, write_manifest, write_scan
from tests.engine.factory import smooth_scan

pytestmark = pytest.mark.thorough  # the C++ library is built for a minute


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


def test_a_native_bundle_is_refused_in_the_words_of_its_library(command, own_native_bundle, scan, tmp_path):
    (own_native_bundle / "weights.safetensors").write_bytes(b"")
    expect_failure(command, 2, "its SHA-256 must be", own_native_bundle, scan, tmp_path / "out.nii.gz")


def test_a_native_bundle_runs_on_cpus_alone(command, native_bundle, scan, tmp_path):
    text = "built for device cpu, it cannot run on cuda"
    expect_failure(command, 2, text, native_bundle, scan, tmp_path / "out.nii.gz", "--device", "cuda")


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
    expect_failure(command, 1, "must be 3D, got 4 axes", bundle, film, output)
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
