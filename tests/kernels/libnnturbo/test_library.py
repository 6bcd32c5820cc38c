"""libnnturbo through its header: bundles of the native backend give the labels that Python gives with them."""

import os
import re
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from nnturbo.engine import Engine, Volume
from nnturbo.engine import build as build_bundle
from nnturbo.engine.backends.native import NativeBackend

from tests.cpp.factory import SHAPE, write_manifest
from tests.engine.factory import (
    dataset_json,
    multi_task,
    plans_2d,
    plans_json,
    pooled_classifier,
    random_weights,
    smooth_scan,
    write_model,
    write_scan,
)
from tests.kernels.libnnturbo.library import BAD_ARGUMENT, BAD_BUNDLE, BAD_SCAN, CANCELLED, LibraryError, Model
from tests.kernels.libnnturbo.nifti import SPACING

pytestmark = pytest.mark.thorough  # the library is built for half a minute
STATM = Path("/proc/self/statm")


def open_model(built, bundle):
    return Model(built / "libnnturbo" / "libnnturbo.so", bundle)


def two_threads():
    torch.set_num_threads(2)
    return {"threads": 2}


REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
KINDS = {
    "labels and classes": (multi_task(plans_json()), dataset_json(), ("0",)),
    "folds": (multi_task(plans_json(), kind="attention"), dataset_json(), ("0", "1", "2")),
    "discriminant analysis": (multi_task(plans_json()), dataset_json(), ("0",)),
    "regions": (plans_json(), dataset_json(**REGIONS), ("0",)),
    "slices": (plans_2d(), dataset_json(), ("0", "1")),
    "two channels": (
        plans_json(normalization_schemes=["ZScoreNormalization"] * 2, use_mask_for_norm=[True, False]),
        dataset_json(channel_names={"0": "T1", "1": "T2"}),
        ("0",),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_pythons(kind, built, tmp_path):
    plans, dataset, folds = KINDS[kind]
    # Weights that give several labels.
    chosen = {"network_weights": random_weights(plans, dataset, seed=3)} if kind == "two channels" else {}
    if kind == "discriminant analysis":
        chosen["pooled_classifier"] = {**pooled_classifier(), "temperature": 1.7}
    folder = write_model(tmp_path / "m", plans=plans, dataset=dataset, folds=folds, checkpoint=chosen)
    bundle = build_bundle(folder, tmp_path / "bundle", backend="native", device="cpu")
    model = open_model(built, bundle)
    array = np.stack([smooth_scan(SHAPE, seed) for seed in range(model.channels)])
    for step, mirror in ((0.5, True), (1.0, False)):
        options = two_threads()
        expected = Engine.load(bundle, tile_step_size=step, mirror=mirror).predict(Volume.from_array(array, SPACING))
        labels, volumes, probabilities = model.predict(
            array, SPACING, tile_step_size=step, mirror=int(mirror), **options
        )
        assert np.array_equal(labels, expected.segmentation)
        assert len(np.unique(labels)) > 1
        assert volumes == pytest.approx(expected.volumes_ml)
        of_case = expected.classification
        assert probabilities == pytest.approx(list(of_case.probabilities) if of_case else [], abs=1e-5)
        assert model.class_names == (list(of_case.class_names) if of_case else [])
    assert model.reader == "SimpleITKIO"
    assert model.regions == (kind == "regions")
    model.close()


def test_answers_in_int16_are_pythons(built, tmp_path):
    if (missing := NativeBackend().unavailable(torch.device("cpu"), "int16")) is not None:
        pytest.skip(missing)
    folder = write_model(tmp_path / "m", plans=multi_task(plans_json()))
    scan, array = write_scan(tmp_path / "scan.nii.gz", shape=SHAPE), smooth_scan(SHAPE, 0)
    options = {"precision": "int16", "calibration": [scan], "floor": 0.5}
    bundle = build_bundle(folder, tmp_path / "bundle", backend="native", device="cpu", **options)
    threads = two_threads()
    expected = Engine.load(bundle).predict(Volume.from_array(array[None], SPACING))
    labels, _, probabilities = open_model(built, bundle).predict(array[None], SPACING, **threads)
    assert np.array_equal(labels, expected.segmentation)
    assert len(np.unique(labels)) > 1
    assert probabilities == pytest.approx(list(expected.classification.probabilities), abs=1e-5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "m", plans=multi_task(plans_json()))
    return build_bundle(folder, folder.parent / "bundle", backend="native", device="cpu")


@pytest.fixture(scope="module")
def model(built, bundle):
    opened = open_model(built, bundle)
    yield opened
    opened.close()


@pytest.fixture
def own_bundle(bundle, tmp_path):
    """A bundle to spoil."""
    return shutil.copytree(bundle, tmp_path / "spoilt")


def test_several_threads_use_one_model_and_others_at_once(built, bundle, model):
    arrays = [smooth_scan(SHAPE, seed)[None] for seed in range(4)]
    expected = [model.predict(array, SPACING, threads=1)[0] for array in arrays]
    found = {}

    def predict(index):
        own = model if index % 2 else open_model(built, bundle)
        found[index] = own.predict(arrays[index], SPACING, threads=1 + index % 2)[0]

    threads = [threading.Thread(target=predict, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, labels in enumerate(expected):
        assert (found[index] != labels).mean() < 1e-3  # with other threads, sums may be rounded in another order


def test_progress_is_told_and_cancels(model):
    told = []

    def progress(context, done, of):
        told.append((done, of))
        return int(len(told) > 3)

    array = smooth_scan(SHAPE)[None]
    with pytest.raises(LibraryError, match="cancelled") as raised:
        model.predict(array, SPACING, progress=progress)
    assert raised.value.status == CANCELLED
    assert [done for done, _ in told] == [0, 1, 2, 3]
    assert len({of for _, of in told}) == 1
    told.clear()
    model.predict(array, SPACING, progress=lambda context, done, of: told.append((done, of)) or 0)
    assert told[-1][0] == told[-1][1]


@pytest.mark.skipif(not STATM.exists(), reason="needs a system that tells what a process has in memory")
def test_memory_does_not_grow_over_calls(built, bundle, model):
    array, bad = smooth_scan(SHAPE)[None], np.zeros((2, 4, 4, 4), np.int16)

    def call(times):
        for _ in range(times):
            model.predict(array, SPACING, tile_step_size=1.0, mirror=0, threads=2)
            open_model(built, bundle).close()
            with pytest.raises(LibraryError):
                model.predict(bad, SPACING)
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = call(20)
    assert call(100) - before < 100 * array.size / 2  # half of what would be left of each call's labels alone


@pytest.mark.parametrize(
    ("array", "options", "status", "message"),
    [
        (np.zeros((1, 4, 4, 4), np.int16), {"tile_step_size": 2.0}, BAD_ARGUMENT, r"must be in \(0, 1\]"),
        (np.zeros((1, 4, 4, 4), np.int16), {"threads": -1}, BAD_ARGUMENT, r"threads must be 0, .* to 1024, got -1"),
        (np.zeros((1, 4, 4, 4), np.int16), {"threads": 2**31 - 1}, BAD_ARGUMENT, r"threads must be 0, .* to 1024"),
        (np.zeros((1, 40, 40, 40), np.int16), {"tile_step_size": 1e-5}, BAD_ARGUMENT, r"at most 10\^12 runs"),
        (np.full((1, 4, 4, 4), 1e300), {}, BAD_SCAN, "voxels must be finite"),
        (np.zeros((2, 4, 4, 4), np.int16), {}, BAD_SCAN, r"takes 1 channel\(s\), got 2"),
        (np.full((1, 4, 4, 4), np.nan), {}, BAD_SCAN, "voxels must be finite"),
    ],
)
def test_calls_that_are_refused(array, options, status, message, model):
    with pytest.raises(LibraryError, match=message) as raised:
        model.predict(array, SPACING, **options)
    assert raised.value.status == status


def test_null_pointers_are_refused(model):
    assert model.library.nnturbo_open(None, None, None) == BAD_ARGUMENT
    assert model.library.nnturbo_predict(None, None, None, None, None) == BAD_ARGUMENT


def changed(name, content):
    def spoil(folder):
        path = folder / name
        path.write_bytes(content(path.read_bytes()))
        write_manifest(folder)

    return spoil


def of_shape(shape):
    """Spoil the shape of the first tensor."""

    def spoil(content):
        length = struct.unpack("<Q", content[:8])[0]
        header = re.sub(rb'"shape": ?\[', b'"shape":[' + shape + b",", content[8 : 8 + length], count=1)
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    return spoil


def header_beyond(content):
    return struct.pack("<Q", len(content)) + content[8:]


SPOILT = {
    "no manifest": (lambda folder: (folder / "engine.json").unlink(), "must be a folder with engine.json"),
    "no JSON": (lambda folder: (folder / "engine.json").write_text("{"), "the form that nnturbo writes"),
    "newer": (lambda folder: write_manifest(folder, schema=99), "must have schema 1, it has schema 99"),
    "other backend": (lambda folder: write_manifest(folder, backend="onnx"), "must be native, this one's is onnx"),
    "cut off": (
        lambda folder: (folder / "weights.safetensors").write_bytes(b"12345678"),
        "the file was changed or cut off",
    ),
    "without path": (
        lambda folder: write_manifest(((folder / "path.json").unlink(), folder)[1]),
        "only Python can run",
    ),
    "elsewhere": (lambda folder: write_manifest(folder, files={"../x": "0"}), "files in the bundle itself"),
    "header": (changed("weights.safetensors", header_beyond), "its header must lie inside the file"),
    "no whole number": (changed("weights.safetensors", of_shape(b"1e308")), "offsets must be whole numbers"),
    "below zero": (changed("weights.safetensors", of_shape(b"-1")), "offsets must be whole numbers"),
    "no schema": (lambda folder: write_manifest(folder, schema=1e308), r"must have schema 1, it has schema 1e\+308"),
    "lines": (
        changed("path.json", lambda content: content.replace(b"CTNormalization", b"CT\\n\\u001bNormalization")),
        "normalization CT  Normalization must be",  # in one line, see library.py
    ),
    "program": (
        changed("network.json", lambda content: content.replace(b'"logits": ', b'"logits": 9')),
        "network.json",
    ),
    "weights": (
        changed("network.json", lambda content: content.replace(b"encoder.stages.0", b"encoder.stages.7")),
        "weights.safetensors must hold",
    ),
    "patch": (
        changed("path.json", lambda content: content.replace(b'"patch_size": [\n  8', b'"patch_size": [\n  9')),
        "must be those of path.json",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_bundles_are_refused(kind, built, own_bundle):
    spoil, message = SPOILT[kind]
    spoil(own_bundle)
    with pytest.raises(LibraryError, match=message) as raised:
        open_model(built, own_bundle)
    assert raised.value.status == BAD_BUNDLE
