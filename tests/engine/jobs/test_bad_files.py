"""A folder in which one scan in ten is bad, each in its own way."""

import gzip
import json

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine.cli import main

from tests.engine.factory import smooth_scan, write_model, write_scan

GOOD = 90


def image(array, spacing=(1.5, 1.5, 2.0)):
    made = sitk.GetImageFromArray(array)
    made.SetSpacing(spacing)
    return made


def header_changed(path, offset, content):
    """Write a scan whose NIfTI header has other bytes somewhere."""
    stored = bytearray(gzip.decompress(write_scan(path).read_bytes()))
    stored[offset : offset + len(content)] = content
    path.write_bytes(gzip.compress(bytes(stored)))


def cut_off(path):
    write_scan(path)
    path.write_bytes(path.read_bytes()[:-200])


def flipped_byte(path):
    content = bytearray(write_scan(path).read_bytes())
    content[-200] ^= 0xFF
    path.write_bytes(bytes(content))


def not_a_number(path):
    array = smooth_scan((8, 14, 16)).astype(np.float32)
    array[3, 4, 5] = np.nan
    sitk.WriteImage(image(array), str(path))


def two_channels(path):
    write_scan(path)
    write_scan(path.with_name("two_channels_0001.nii.gz"))


BAD = {
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("no scan"), "header must have 348 bytes"),
    "cut_off": (cut_off, "cut off"),
    "flipped": (flipped_byte, "cannot be read"),
    "not_a_number": (not_a_number, "finite"),
    "no_header": (lambda path: path.write_bytes(gzip.compress(b"not an image" * 100)), "NIfTI"),
    "zero_spacing": (lambda path: header_changed(path, 80, np.float32(0).tobytes() * 3), "spacing"),
    "vector": (
        lambda path: sitk.WriteImage(sitk.Compose([image(smooth_scan((8, 14, 16)))] * 3), str(path)),
        "must be 3D",
    ),
    "two_channels": (
        lambda path: [write_scan(path), write_scan(path.with_name("two_channels_0001.nii.gz"))],
        "1 channel",
    ),
    "broken_link": (lambda path: path.symlink_to(path.with_name("moved.nii.gz")), "moved.nii.gz, which does not exist"),
}


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.thorough)])
def test_good_ones_are_done_and_bad_ones_named(tmp_path, capsys, workers):
    model, scans = write_model(tmp_path / "m"), tmp_path / "scans"
    scans.mkdir()
    for index in range(GOOD):
        write_scan(scans / f"good{index:02d}_0000.nii.gz", index)
    for name, (write, _) in BAD.items():
        write(scans / f"{name}_0000.nii.gz")
    out = tmp_path / "out"
    given = [
        "-i",
        str(scans),
        "-o",
        str(out),
        "-m",
        str(model),
        "-device",
        "cpu",
        "--disable_tta",
        "--backend",
        "torch",
    ]
    assert main(["predict", *given, "--workers", workers]) == 1
    captured = capsys.readouterr()
    assert f"{GOOD} done, 0 already there, {len(BAD)} failed" in captured.out
    records = {each["name"]: each for each in json.loads((out / "predictions.json").read_text())["cases"]}
    assert len(records) == GOOD + len(BAD)
    for name, (_, reason) in BAD.items():
        assert records[name]["status"] == "failed"
        assert reason in records[name]["error"]
        assert f"nnturbo: {name} failed: {records[name]['error']}" in captured.err
        assert not (out / f"{name}.nii.gz").exists()
    assert len(list(out.glob("good*.nii.gz"))) == GOOD
    assert "Traceback" not in captured.err
