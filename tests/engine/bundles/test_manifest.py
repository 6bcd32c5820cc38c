import importlib.util
import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from nnturbo.engine import (
    BackendUnavailable,
    BundleError,
    Engine,
    EngineOptions,
    ModelError,
    OutputError,
    Prediction,
    PredictionError,
    Volume,
    VolumeError,
    build,
)
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.bundles import manifest as bundle_module
from nnturbo.engine.bundles.manifest import MANIFEST, is_bundle, read_manifest
from nnturbo.engine.export import build as compilation
from nnturbo.engine.export import calibration
from nnturbo.engine.export.agreement import Agreement, measure_agreement
from nnturbo.engine.export.calibration import CALIBRATION_TILES, calibration_tiles
from nnturbo.engine.files import sha256
from nnturbo.engine.model.folder import read_model

from tests.engine.factory import multi_task, plans_json, pooled_classifier, smooth_scan, write_model

SPACING = (3.0, 1.2, 1.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("model") / "m",
        plans=multi_task(plans_json()),
        folds=("0", "1"),
        checkpoint={"pooled_classifier": pooled_classifier()},
    )


@pytest.fixture(scope="module")
def scan():
    return Volume.from_array(smooth_scan((9, 24, 26)), SPACING, name="scan")


@pytest.fixture(scope="module")
def small_scan():
    """Of one tile: bfloat16 takes long on CPUs that do not have it."""
    return Volume.from_array(smooth_scan((8, 12, 16)), (2.0, 1.5, 1.5), name="small scan")


@pytest.fixture(scope="module")
def kept(model, tmp_path_factory):
    """One bundle for all tests that only read."""
    return build(model, tmp_path_factory.mktemp("bundles") / "b", backend="torchscript", device="cpu")


@pytest.fixture
def bundle(kept, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(kept, tmp_path / "bundle")


def change(bundle, **values):
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**manifest, **values}))


class TestUse:
    @pytest.mark.parametrize("backend", ["torch", "torchscript"])
    def test_answers_are_those_of_the_model(self, model, scan, tmp_path, backend):
        expected = Engine.load(model, backend="torch", device="cpu").predict(scan)
        out = build(model, tmp_path / "b", backend=backend, device="cpu")
        shutil.move(out, tmp_path / "moved")
        prediction = Engine.load(tmp_path / "moved").predict(scan)
        assert np.array_equal(prediction.segmentation, expected.segmentation)
        assert prediction.classification.label == expected.classification.label
        assert np.allclose(prediction.classification.logits, expected.classification.logits, atol=1e-4)
        assert (prediction.provenance[0].backend, prediction.provenance[0].precision) == (backend, "fp32")
        assert prediction.provenance[0].classifier == "lda"
        assert prediction.provenance[0].mirror_views == 8
        assert prediction.provenance[0].source == {
            f"fold_{fold}/checkpoint_final.pth": sha256(model / f"fold_{fold}" / "checkpoint_final.pth")
            for fold in (0, 1)
        }

    def test_it_needs_no_pickle_and_no_checkpoint(self, kept):
        assert sorted(path.name for path in kept.iterdir()) == sorted([MANIFEST, *read_manifest(kept).files])
        assert not [path for path in kept.iterdir() if path.suffix in (".pth", ".pkl")]

    def test_what_is_chosen_at_build_stays_and_what_is_chosen_at_load_can_change(self, model, scan, tmp_path):
        out = build(model, tmp_path / "b", backend="torch", device="cpu", folds=[1], classifier="head")
        prediction = Engine.load(out, mirror=False, options=EngineOptions(aggregation="mean")).predict(scan)
        expected = Engine.load(
            model,
            device="cpu",
            folds=[1],
            mirror=False,
            options=EngineOptions(aggregation="mean", classifier="head"),
        ).predict(scan)
        assert np.array_equal(prediction.segmentation, expected.segmentation)
        assert prediction.classification == expected.classification
        assert prediction.provenance[0].aggregation == "mean"
        assert prediction.provenance[0].folds == ("1",)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"folds": [0]}, "built with folds 0, 1, not 0"),
            (
                {"checkpoint": "checkpoint_best.pth"},
                "built with checkpoint checkpoint_final.pth, not checkpoint_best.pth",
            ),
            ({"configuration": "2d"}, "built with configuration 3d_fullres, not 2d"),
            ({"backend": "torch"}, "built with backend torchscript, not torch"),
            ({"precision": "bf16"}, "built with precision fp32, not bf16"),
            ({"options": EngineOptions(classifier="head")}, "built with classifier lda, not head"),
            ({"device": "cuda:99"}, "device cuda:99 is not there"),
        ],
    )
    def test_what_it_was_not_built_for_is_refused(self, kept, arguments, message):
        with pytest.raises((BundleError, BackendUnavailable), match=message):
            Engine.load(kept, **arguments)

    def test_repeating_what_it_was_built_for_is_fine(self, kept, scan):
        engine = Engine.load(
            kept,
            folds=["1", 0],
            checkpoint="checkpoint_final.pth",
            configuration="3d_fullres",
            backend="torchscript",
            precision="fp32",
            device="cpu",
            options=EngineOptions(classifier="lda"),
        )
        assert engine.class_names == ("0", "1", "2")

    def test_its_own_hash_of_a_zip_is_the_zips(self, model, tmp_path):
        archive = shutil.make_archive(str(tmp_path / "model"), "zip", model.parent, "m")
        out = build(archive, tmp_path / "b", backend="torch", device="cpu")
        assert dict(read_manifest(out).source) == {"model.zip": sha256(tmp_path / "model.zip")}


class TestDamage:
    def test_a_changed_artefact(self, bundle):
        content = bytearray((bundle / "network.ts").read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / "network.ts").write_bytes(content)
        with pytest.raises(BundleError, match=r"network\.ts is not what was built: its SHA-256 differs"):
            Engine.load(bundle)

    def test_a_truncated_artefact(self, bundle):
        content = (bundle / "network.ts").read_bytes()
        (bundle / "network.ts").write_bytes(content[: len(content) // 2])
        with pytest.raises(BundleError, match="SHA-256 differs"):
            Engine.load(bundle)

    def test_a_missing_artefact(self, bundle):
        (bundle / "network.ts").unlink()
        with pytest.raises(BundleError, match=r"must hold 'network\.ts'"):
            Engine.load(bundle)

    def test_an_artefact_outside_of_it(self, bundle, tmp_path):
        (tmp_path / "other").write_bytes(b"x")
        change(bundle, files={"../other": sha256(tmp_path / "other")})
        with pytest.raises(BundleError, match=r"must hold '\.\./other'"):
            Engine.load(bundle)

    def test_an_artefact_that_nothing_vouches_for(self, bundle):
        change(bundle, files={})
        with pytest.raises(BundleError, match=r"and nothing else, it holds 'network\.ts', which cannot be verified"):
            Engine.load(bundle)

    @pytest.mark.parametrize("backend", [name for name in backends() if name not in ("tensorrt", "torch_tensorrt")])
    def test_an_artefact_that_was_damaged_before_it_was_hashed(self, bundle, backend):
        if reason := backends()[backend].unavailable(torch.device("cpu"), "fp32"):
            pytest.skip(reason)
        for path in bundle.iterdir():
            if path.name != MANIFEST:
                path.unlink()
        names = ("network.ts", "network.pt2", "network.xml", "network.bin", "network.onnx", "fold_0.pth", "fold_1.pth")
        for name in names:
            (bundle / name).write_bytes(b"no network")
        manifest = json.loads((bundle / MANIFEST).read_text())
        here = {**manifest["machine"], **bundle_module.describe_machine(torch.device("cpu"))}
        change(bundle, backend=backend, machine=here, files={name: sha256(bundle / name) for name in names})
        with pytest.raises(ModelError, match=f"{backend} cannot load|fold_0.pth must"):
            Engine.load(bundle)

    def test_a_newer_schema(self, bundle):
        change(bundle, schema=2)
        with pytest.raises(BundleError, match="schema 2, this nnturbo knows up to 1: update nnturbo"):
            Engine.load(bundle)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "cannot be read"),
            (b"{", "cannot be read"),
            (b"[]", "an object with a schema number"),
            (b'{"schema": true}', "an object with a schema number"),
            (b'{"schema": 1}', "missing or unknown are agreement, backend"),
            (b"[" * 100_000, "cannot be read"),
        ],
    )
    def test_what_is_no_manifest(self, bundle, content, message):
        (bundle / MANIFEST).write_bytes(content)
        with pytest.raises(BundleError, match=message):
            Engine.load(bundle)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"folds": "0"}, "folds must be a list"),
            ({"folds": ["../0"]}, "folds must be one or more names"),
            ({"folds": []}, "folds must be one or more names"),
            ({"mirror_axes": [0, 0]}, "mirror_axes must be among 0, 1, 2 and differ"),
            ({"schema": 0}, "must have a schema of 1 or more"),
            ({"precision": "fp8"}, "in fp8, which this nnturbo lacks"),
            ({"machine": {"device": 1}}, "machine must be described in words"),
            ({"mirror_axes": [3]}, "mirror_axes must be among 0, 1, 2"),
            ({"plans": None}, "plans must be a dict"),
            ({"plans": {}}, "configurations"),
            ({"extra": 1}, "missing or unknown are extra"),
            ({"backend": "magic"}, "was built for magic in fp32, which this nnturbo lacks"),
            ({"backend": "auto"}, "was built for auto in fp32, which this nnturbo lacks"),
            ({"precision": "fp16"}, "fp16 needs a GPU"),
        ],
    )
    def test_values_that_cannot_be(self, bundle, values, message):
        change(bundle, **values)
        with pytest.raises((ModelError, BackendUnavailable), match=message):
            Engine.load(bundle)

    @pytest.mark.parametrize("change_of", ["labels", "class names"])
    def test_a_network_that_gives_something_else_than_the_plan_says(self, bundle, scan, change_of):
        manifest = json.loads((bundle / MANIFEST).read_text())
        if change_of == "labels":
            manifest["dataset"]["labels"]["more"] = 3
            message = "the network failed on a tile"
        else:
            arguments = manifest["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
            arguments["head"]["class_names"].append("more")
            message = "logits of the plan's 4 classes, it gave 3"
        change(bundle, **manifest)
        engine = Engine.load(bundle, mirror=False)
        with pytest.raises(PredictionError, match=message):
            engine.predict(scan)

    def test_a_large_manifest_is_not_read(self, bundle, monkeypatch):
        monkeypatch.setattr(bundle_module, "LARGEST_MANIFEST_BYTES", 100)
        with pytest.raises(BundleError, match="at most 100 bytes"):
            Engine.load(bundle)

    def test_compiled_for_another_machine(self, bundle, monkeypatch):
        backend = type(backends()["torchscript"])
        monkeypatch.setattr(backend, "bound_to", ("architecture", "cpu", "torch"))
        Engine.load(bundle)
        manifest = json.loads((bundle / MANIFEST).read_text())
        change(bundle, machine={**manifest["machine"], "cpu": "Z80"}, versions={"torch": "0.1"})
        with pytest.raises(
            BundleError, match=r"cpu Z80 there, .+ here; torch 0\.1 there, .+ here.*Build it again on this machine"
        ):
            Engine.load(bundle)


class TestBuild:
    def test_an_existing_folder_stays(self, model, tmp_path):
        (tmp_path / "b").mkdir()
        with pytest.raises(OutputError, match="exists: choose another folder"):
            build(model, tmp_path / "b", backend="torch", device="cpu")
        assert list((tmp_path / "b").iterdir()) == []

    def test_a_folder_that_cannot_be_made(self, model, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            build(model, tmp_path / "file" / "b", backend="torch", device="cpu")

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
    def test_a_build_that_fails_leaves_nothing(self, model, tmp_path, monkeypatch, error, expected, message):
        def fail(self, model, tiles, precision, folder):
            (folder / "half").write_text("")
            raise error

        monkeypatch.setattr(type(backends()["torch"]), "build", fail)
        with pytest.raises(expected, match=message):
            build(model, tmp_path / "b", backend="torch", device="cpu")
        assert list(tmp_path.iterdir()) == []

    def test_lower_precision_needs_scans_to_measure_on(self, model, tmp_path):
        with pytest.raises(ValueError, match="bf16 changes some labels"):
            build(model, tmp_path / "b", backend="torch", device="cpu", precision="bf16")

    @pytest.mark.parametrize("floor", [-0.1, 1.1])
    def test_a_floor_is_a_dice(self, model, tmp_path, floor):
        with pytest.raises(ValueError, match="floor must be a Dice from 0 to 1"):
            build(model, tmp_path / "b", device="cpu", floor=floor, calibration=["scan"])

    def test_a_backend_that_is_not_there(self, model, tmp_path):
        with pytest.raises(BackendUnavailable, match="fp16 needs a GPU"):
            build(model, tmp_path / "b", backend="torch", device="cpu", precision="fp16")
        assert list(tmp_path.iterdir()) == []

    def test_a_bundle_is_no_model_to_build_from(self, kept, tmp_path):
        with pytest.raises(ModelError, match="is a bundle already; build from the model folder"):
            build(kept, tmp_path / "b", backend="torch", device="cpu")

    def test_what_an_earlier_build_left_is_no_obstacle(self, model, tmp_path):
        (tmp_path / ".writing-b-left").mkdir()
        assert is_bundle(build(model, tmp_path / "b", backend="torch", device="cpu"))

    def test_it_is_a_bundle_and_the_model_is_none(self, kept, model, tmp_path):
        assert is_bundle(kept)
        assert not is_bundle(model)
        assert not is_bundle(tmp_path / "nowhere")


class TestAgreement:
    def test_it_is_measured_and_kept(self, model, small_scan, tmp_path):
        out = build(
            model,
            tmp_path / "b",
            backend="torchscript",
            device="cpu",
            precision="bf16",
            calibration=[small_scan, small_scan],
            calibration_name="smooth fields",
            floor=0.5,
        )
        agreement = read_manifest(out).agreement
        exact = Engine.load(model, device="cpu", mirror=False).predict(small_scan).segmentation
        low = Engine.load(out, mirror=False).predict(small_scan)
        assert (agreement["scans"], agreement["what"]) == (2, "smooth fields")
        assert agreement["voxels"] == 2 * exact.size
        assert agreement["different"] == 2 * np.count_nonzero(low.segmentation != exact) > 0
        for name, label in (("pancreas", 1), ("lesion", 2)):
            one, other = exact == label, low.segmentation == label
            dice = 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))
            assert agreement["dice"][name] == pytest.approx(dice)
        assert agreement["same_class"] in (0, 1, 2)
        assert low.provenance[0].agreement == agreement

    def test_below_the_floor_there_is_no_bundle(self, model, small_scan, tmp_path):
        with pytest.raises(
            BundleError, match=r"bf16 must agree with fp32 to a Dice of 1 for every label, it does to 0\."
        ):
            build(
                model,
                tmp_path / "b",
                backend="torchscript",
                device="cpu",
                precision="bf16",
                calibration=[small_scan],
                floor=1.0,
            )
        assert list(tmp_path.iterdir()) == []

    def test_fp32_is_measured_where_scans_are_given(self, model, scan, tmp_path):
        out = build(model, tmp_path / "b", backend="torch", device="cpu", calibration=[scan])
        agreement = read_manifest(out).agreement
        assert agreement["different"] == 0
        assert set(agreement["dice"].values()) == {1.0}
        assert agreement["same_class"] == 1

    def test_labels_that_no_scan_shows_are_not_called_equal(self, model, tmp_path):
        def scan_of(*labels):
            return Prediction(
                segmentation=np.array([[labels]], np.uint8),
                probabilities=None,
                geometry=None,
                labels=None,
                timings={},
                warnings=(),
                provenance=(),
                properties={},
                classification=None,
            )

        class Fixed:
            model = read_model(write_model(tmp_path / "plain"))
            class_names = None

            def __init__(self, answer):
                self.answer = answer

            def predict(self, image):
                return self.answer

        seen = measure_agreement(Fixed(scan_of(0, 1, 1)), Fixed(scan_of(0, 1, 0)), ["scan"], "scans")
        assert seen.dice == {"pancreas": pytest.approx(2 / 3), "lesion": None}
        assert seen.lowest_dice == pytest.approx(2 / 3)
        assert "pancreas 0.6667, lesion not seen" in str(seen)
        nothing = measure_agreement(Fixed(scan_of(0, 0)), Fixed(scan_of(0, 0)), ["scan"], "scans")
        assert nothing.lowest_dice is None
        with pytest.raises(BundleError, match="the scans must show what the model segments"):
            compilation._check_floor(nothing, 0.0, "bf16")

    @pytest.mark.parametrize("content", [{}, [], {"scans": 1}, None])
    def test_what_is_no_agreement(self, kept, content):
        with pytest.raises(BundleError, match="a bundle's agreement must have scans, voxels"):
            Agreement.parse(content)

    @pytest.mark.parametrize("change_of", [{"voxels": "1"}, {"dice": {"a": "1"}}, {"same_class": 0.5}])
    def test_values_that_no_agreement_has(self, change_of):
        good = {"scans": 1, "voxels": 1, "different": 0, "dice": {"a": None}, "same_class": None, "what": "scans"}
        assert asdict(Agreement.parse(good)) == good
        with pytest.raises(BundleError, match="a bundle's agreement: "):
            Agreement.parse({**good, **change_of})

    def test_int8_is_measured_on_scans_that_did_not_calibrate_it(self, model, tmp_path, monkeypatch):
        calibrated, measured = [], []
        monkeypatch.setattr(compilation, "usable_backends", lambda *_: [backends()["torch"]])
        monkeypatch.setattr(
            compilation,
            "calibration_tiles",
            lambda _, scans, __: calibrated.extend(scans) or torch.zeros(2, 1, 8, 12, 16),
        )
        monkeypatch.setattr(compilation, "measure_agreement", lambda _, __, scans, ___: measured.extend(scans) or 1 / 0)
        monkeypatch.setattr(Engine, "load", lambda *_, **__: None)
        with pytest.raises(ZeroDivisionError):
            build(model, tmp_path / "b", precision="int8", device="cpu", calibration=["a", "b", "c", "d", "e"])
        assert (calibrated, measured) == (["a", "c", "e"], ["b", "d"])

    def test_a_floor_needs_scans(self, model, tmp_path):
        with pytest.raises(ValueError, match="a floor needs scans"):
            build(model, tmp_path / "b", device="cpu", floor=0.9)

    def test_scans_that_do_not_fit_are_named(self, model, tmp_path):
        two = Volume.from_array(np.zeros((2, 9, 9, 9), np.int16), SPACING, name="two channels")
        with pytest.raises(VolumeError, match="two channels"):
            build(model, tmp_path / "b", backend="torch", device="cpu", calibration=[two])
        assert list(tmp_path.iterdir()) == []


class TestCalibrationTiles:
    def test_they_are_preprocessed_and_spread_over_the_scans(self, model, scan):
        loaded = read_model(model)
        tiles = calibration_tiles(loaded, [scan], torch.device("cpu"))
        assert tiles.shape[1:] == (1, 8, 12, 16)
        assert 1 < len(tiles) <= CALIBRATION_TILES
        assert tiles.abs().max() < 10  # normalised: the scan has hundreds
        assert tiles.std() > 0.1

    def test_many_are_thinned_evenly(self, model, scan, monkeypatch):
        monkeypatch.setattr(calibration, "CALIBRATION_TILES", 3)
        loaded = read_model(model)
        every = []

        class Recorder(calibration._TileRecorder):
            def __call__(self, tiles):
                every.append(tiles.clone())
                return super().__call__(tiles)

        monkeypatch.setattr(calibration, "_TileRecorder", Recorder)
        tiles = calibration_tiles(loaded, [scan] * 3, torch.device("cpu"))
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
    def test_a_bundle_says_what_for_and_that_nothing_was_measured(self, model, tmp_path):
        out = build(model, tmp_path / "b", compute_capabilities=["8.6", "12.0"])
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
    def test_what_cannot_be(self, model, tmp_path, arguments, error, message):
        with pytest.raises(error, match=message):
            build(model, tmp_path / "b", **{"compute_capabilities": ["8.6"], **arguments})
