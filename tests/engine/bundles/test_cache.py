import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from nnturbo.engine import Engine, Volume
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.bundles import cache as cache_module
from nnturbo.engine.bundles.manifest import MANIFEST

from tests.engine.factory import smooth_scan, write_model

SCAN = Volume.from_array(smooth_scan((9, 14, 17)), (2.0, 1.5, 1.5), name="scan")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("NNTURBO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "m")


@pytest.fixture
def builds(monkeypatch):
    """Counts what is compiled."""
    kind = type(backends()["torchscript"])
    counted, build = [], kind.build

    def count(self, model, tiles, precision, folder):
        counted.append(precision)
        return build(self, model, tiles, precision, folder)

    monkeypatch.setattr(kind, "build", count)
    return counted


def load(model, **arguments):
    return Engine.load(model, device="cpu", backend="torchscript", mirror=False, **arguments)


def bundles(root):
    return sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))


def test_a_model_is_compiled_once_and_predicts_as_torch(root, model, builds, caplog):
    expected = Engine.load(model, device="cpu", backend="torch", mirror=False).predict(SCAN)
    for _ in range(3):
        assert np.array_equal(load(model).predict(SCAN).segmentation, expected.segmentation)
    assert builds == ["fp32"]
    assert len(bundles(root)) == 1
    assert caplog.text.count(f"compiling for torchscript, once: it is kept in {root}") == 1


def test_other_weights_and_precisions_are_other_bundles(root, model, builds, tmp_path):
    load(model)
    load(model, precision="bf16")
    load(write_model(tmp_path / "other", checkpoint={"inference_allowed_mirroring_axes": (0,)}))
    assert builds == ["fp32", "bf16", "fp32"]
    assert len(bundles(root)) == 3


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_what_is_damaged_is_made_again(root, model, builds, damage):
    load(model)
    folder = bundles(root)[0]
    if damage == "truncate":
        (folder / "network.ts").write_bytes(b"x")
    elif damage == "remove":
        (folder / "network.ts").unlink()
    else:
        (folder / MANIFEST).write_text("{")
    load(model).predict(SCAN)
    assert builds == ["fp32", "fp32"]


def test_what_was_not_used_for_longest_goes(root, tmp_path, builds, monkeypatch):
    models = [write_model(tmp_path / f"m{i}", checkpoint={"inference_allowed_mirroring_axes": (i,)}) for i in range(3)]
    load(models[0])
    size = sum(file.stat().st_size for file in bundles(root)[0].iterdir())
    load(models[1])
    past = time.time() - 1000
    for folder in bundles(root):
        os.utime(folder / MANIFEST, (past, past))
    load(models[0])  # used again: now the other one is the older
    monkeypatch.setattr(cache_module, "LARGEST_CACHE_BYTES", 2.5 * size)
    load(models[2])
    assert len(bundles(root)) == 2
    load(models[0])
    load(models[2])
    assert len(builds) == 3
    load(models[1])
    assert len(builds) == 4


def test_what_is_in_use_stays_however_full_it_is(root, tmp_path, monkeypatch):
    first, second = (
        write_model(tmp_path / f"m{i}", checkpoint={"inference_allowed_mirroring_axes": (i,)}) for i in range(2)
    )
    load(first)
    used = bundles(root)[0]
    monkeypatch.setattr(cache_module, "LARGEST_CACHE_BYTES", 0)
    with cache_module._lock(used).read_lock():
        load(second)
        assert used in bundles(root)
    load(write_model(tmp_path / "m3", checkpoint={"inference_allowed_mirroring_axes": (2,)}))
    assert used not in bundles(root)


def _load_and_predict(model, answers):
    answers.put(int(load(model).predict(SCAN).segmentation.sum()))


@pytest.mark.thorough
def test_processes_that_start_together_compile_once(root, model):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=_load_and_predict, args=(model, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = [answers.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(set(sums)) == 1
    assert len(bundles(root)) == 1
    assert not list(root.glob(".writing-*"))


def test_without_a_cache_it_is_compiled_each_time_and_that_is_said(model, tmp_path, monkeypatch, builds, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NNTURBO_CACHE", str(tmp_path / "file" / "cache"))
    expected = Engine.load(model, device="cpu", backend="torch", mirror=False).predict(SCAN)
    for _ in range(2):
        assert np.array_equal(load(model).predict(SCAN).segmentation, expected.segmentation)
    assert len(builds) == 2
    assert "what is compiled is not kept" in caplog.text
    assert "name another folder in the environment variable NNTURBO_CACHE" in caplog.text


def test_without_a_home_folder_too(model, monkeypatch, builds, caplog):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NNTURBO_CACHE")
    monkeypatch.setattr(Path, "home", nobody)
    load(model)
    assert "there is no home folder" in caplog.text


def test_what_an_interrupted_build_left_goes(root, model, builds):
    load(model)
    (folder,) = bundles(root)
    left = root / f".writing-{folder.name}-abc"
    left.mkdir()
    (folder / MANIFEST).unlink()
    load(model)
    assert not left.exists()
    assert bundles(root) == [folder]


def test_folders_of_others_stay(root, model, monkeypatch):
    load(model)
    other = root / "mine"
    shutil.copytree(bundles(root)[0], other)
    monkeypatch.setattr(cache_module, "LARGEST_CACHE_BYTES", 0)
    load(write_model(root.parent / "m2", checkpoint={"inference_allowed_mirroring_axes": (2,)}))
    assert other.is_dir()
    assert len(bundles(root)) == 2  # that, and what was made last


def test_int8_is_not_made_on_the_fly(model, root):
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match="int8 needs scans to calibrate with"):
        Engine.load(model, device="cpu", backend="openvino", precision="int8")
