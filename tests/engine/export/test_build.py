"""Building bundles: what is refused, what a build that fails leaves, and tiles to calibrate with."""

import importlib.util

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, BundleError, Engine, ModelError, OutputError, build
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.bundles import manifest as bundle_module
from nnturbo.engine.bundles.manifest import is_bundle, read_manifest
from nnturbo.engine.export import calibration
from nnturbo.engine.export.calibration import CALIBRATION_TILES, calibration_tiles
from nnturbo.engine.model.folder import read_model


class TestBuild:
    def test_an_existing_folder_stays(self, multi_task_model, tmp_path):
        (tmp_path / "b").mkdir()
        with pytest.raises(OutputError, match="exists: choose another folder"):
            build(multi_task_model, tmp_path / "b", backend="torch", device="cpu")
        assert list((tmp_path / "b").iterdir()) == []

    def test_a_folder_that_cannot_be_made(self, multi_task_model, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            build(multi_task_model, tmp_path / "file" / "b", backend="torch", device="cpu")

    @pytest.mark.parametrize(
        ("error", "expected", "message"),
        [
            (
                RuntimeError("out of memory\nstack"),
                BackendUnavailable,
                "torch could not compile .* in fp32: out of memory",
            ),
            (MemoryError(), BackendUnavailable, "MemoryError.*a machine with more memory"),
            (OSError(28, "disk full"), OutputError, "cannot be written: disk full"),
            (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        ],
    )
    def test_a_build_that_fails_leaves_nothing(self, multi_task_model, tmp_path, monkeypatch, error, expected, message):
        def fail(self, model, tiles, precision, folder):
            (folder / "half").write_text("")
            raise error

        monkeypatch.setattr(type(backends()["torch"]), "build", fail)
        with pytest.raises(expected, match=message):
            build(multi_task_model, tmp_path / "b", backend="torch", device="cpu")
        assert list(tmp_path.iterdir()) == []

    def test_lower_precision_needs_scans_to_measure_on(self, multi_task_model, tmp_path):
        with pytest.raises(ValueError, match="bf16 changes some labels"):
            build(multi_task_model, tmp_path / "b", backend="torch", device="cpu", precision="bf16")

    @pytest.mark.parametrize("floor", [-0.1, 1.1])
    def test_a_floor_is_a_dice(self, multi_task_model, tmp_path, floor):
        with pytest.raises(ValueError, match="floor must be a Dice from 0 to 1"):
            build(multi_task_model, tmp_path / "b", device="cpu", floor=floor, calibration=["scan"])

    def test_a_backend_that_is_not_there(self, multi_task_model, tmp_path):
        with pytest.raises(BackendUnavailable, match="fp16 needs a GPU"):
            build(multi_task_model, tmp_path / "b", backend="torch", device="cpu", precision="fp16")
        assert list(tmp_path.iterdir()) == []

    def test_a_bundle_is_no_model_to_build_from(self, built_bundle, tmp_path):
        with pytest.raises(ModelError, match="is a bundle already; build from the model folder"):
            build(built_bundle, tmp_path / "b", backend="torch", device="cpu")

    def test_what_an_earlier_build_left_is_no_obstacle(self, multi_task_model, tmp_path):
        (tmp_path / ".writing-b-left").mkdir()
        assert is_bundle(build(multi_task_model, tmp_path / "b", backend="torch", device="cpu"))

    def test_it_is_a_bundle_and_the_model_is_none(self, built_bundle, multi_task_model, tmp_path):
        assert is_bundle(built_bundle)
        assert not is_bundle(multi_task_model)
        assert not is_bundle(tmp_path / "nowhere")


class TestCalibrationTiles:
    def test_they_are_preprocessed_and_spread_over_the_scans(self, multi_task_model, several_tiles):
        loaded = read_model(multi_task_model)
        tiles = calibration_tiles(loaded, [several_tiles], torch.device("cpu"))
        assert tiles.shape[1:] == (1, 8, 12, 16)
        assert 1 < len(tiles) <= CALIBRATION_TILES
        assert tiles.abs().max() < 10  # normalised: the scan has hundreds
        assert tiles.std() > 0.1

    def test_many_are_thinned_evenly(self, multi_task_model, several_tiles, monkeypatch):
        monkeypatch.setattr(calibration, "CALIBRATION_TILES", 3)
        loaded = read_model(multi_task_model)
        every = []

        class Recorder(calibration._TileRecorder):
            def __call__(self, tiles):
                every.append(tiles.clone())
                return super().__call__(tiles)

        monkeypatch.setattr(calibration, "_TileRecorder", Recorder)
        tiles = calibration_tiles(loaded, [several_tiles] * 3, torch.device("cpu"))
        places = [next(i for i, one in enumerate(every) if torch.equal(one[0], tile)) for tile in tiles]
        assert 2 <= len(tiles) <= 3
        assert len(every) > 12
        per_scan = len(every) // 3
        steps = np.diff(places)
        assert (steps % per_scan != 0).any() or len(set(steps)) == 1


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="builds without a GPU: pip install tensorrt-rtx-cu13"
)
class TestOtherGpus:
    @pytest.mark.thorough
    def test_a_bundle_says_what_for_and_that_nothing_was_measured(self, multi_task_model, tmp_path):
        out = build(multi_task_model, tmp_path / "b", compute_capabilities=["8.6", "12.0"])
        manifest = read_manifest(out)
        assert (manifest.backend, manifest.precision, manifest.agreement) == ("tensorrt", "fp16", None)
        assert manifest.machine["device"] == "cuda"
        assert manifest.machine["compute_capability"] == "8.6, 12.0"
        assert len(manifest.files) == 2  # one engine per fold
        with pytest.raises(BackendUnavailable, match="cuda is not there"):
            Engine.load(out)
        backend = backends()["tensorrt"]
        here = {key: value for key, value in manifest.machine.items() if key != "compute_capability"}
        for capability, fits in (("8.6", True), ("12.0", True), ("8.9", False)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    bundle_module, "describe_machine", lambda _, c=capability: {**here, "compute_capability": c}
                )
                if fits:
                    bundle_module.check_machine(manifest, backend, torch.device("cpu"), out)
                else:
                    with pytest.raises(BundleError, match=r"compute_capability 8\.6, 12\.0 there, 8\.9 here"):
                        bundle_module.check_machine(manifest, backend, torch.device("cpu"), out)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"backend": "onnx"}, ValueError, "only tensorrt can build, not onnx"),
            ({"precision": "int8"}, BackendUnavailable, "not in int8"),
            ({"compute_capabilities": ["9.0"]}, BackendUnavailable, "not 9.0"),
            ({"calibration": ["scan.nii.gz"]}, ValueError, "agreement cannot be measured for GPUs that are not here"),
        ],
    )
    def test_what_cannot_be(self, multi_task_model, tmp_path, arguments, error, message):
        with pytest.raises(error, match=message):
            build(multi_task_model, tmp_path / "b", **{"compute_capabilities": ["8.6"], **arguments})
