import json
import shutil

import numpy as np
import pytest
import torch
from nnturbo.engine import BackendUnavailable, BundleError, Engine, EngineOptions, ModelError, PredictionError, build
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.bundles import manifest as bundle_module
from nnturbo.engine.bundles.manifest import MANIFEST, read_manifest
from nnturbo.engine.files import sha256
from nnturbo.engine.jobs.job import load_predictor
from nnturbo.engine.options import ModelChoice


@pytest.fixture
def bundle(built_bundle, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(built_bundle, tmp_path / "bundle")


def change(bundle, **values):
    manifest = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**manifest, **values}))


class TestUse:
    @pytest.mark.parametrize("backend", ["torch", "torchscript"])
    def test_answers_are_those_of_the_model(self, multi_task_model, several_tiles, tmp_path, backend):
        expected = Engine.load(multi_task_model, backend="torch", device="cpu").predict(several_tiles)
        out = build(multi_task_model, tmp_path / "b", backend=backend, device="cpu")
        shutil.move(out, tmp_path / "moved")
        prediction = Engine.load(tmp_path / "moved").predict(several_tiles)
        assert np.array_equal(prediction.segmentation, expected.segmentation)
        assert prediction.classification.label == expected.classification.label
        assert np.allclose(prediction.classification.logits, expected.classification.logits, atol=1e-4)
        assert (prediction.provenance[0].backend, prediction.provenance[0].precision) == (backend, "fp32")
        assert prediction.provenance[0].classifier == "lda"
        assert prediction.provenance[0].mirror_views == 8
        assert prediction.provenance[0].source == {
            f"fold_{fold}/checkpoint_final.pth": sha256(multi_task_model / f"fold_{fold}" / "checkpoint_final.pth")
            for fold in (0, 1)
        }

    def test_it_needs_no_pickle_and_no_checkpoint(self, built_bundle):
        assert sorted(path.name for path in built_bundle.iterdir()) == sorted(
            [MANIFEST, *read_manifest(built_bundle).files]
        )
        assert not [path for path in built_bundle.iterdir() if path.suffix in (".pth", ".pkl")]

    def test_what_is_chosen_at_build_stays_and_what_is_chosen_at_load_can_change(
        self, multi_task_model, several_tiles, tmp_path
    ):
        out = build(multi_task_model, tmp_path / "b", backend="torch", device="cpu", folds=[1], classifier="head")
        prediction = Engine.load(out, mirror=False, options=EngineOptions(aggregation="mean")).predict(several_tiles)
        expected = Engine.load(
            multi_task_model,
            device="cpu",
            folds=[1],
            mirror=False,
            options=EngineOptions(aggregation="mean", classifier="head"),
        ).predict(several_tiles)
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
    def test_what_it_was_not_built_for_is_refused(self, built_bundle, arguments, message):
        with pytest.raises((BundleError, BackendUnavailable), match=message):
            Engine.load(built_bundle, **arguments)

    def test_repeating_what_it_was_built_for_is_fine(self, built_bundle, several_tiles):
        engine = Engine.load(
            built_bundle,
            folds=["1", 0],
            checkpoint="checkpoint_final.pth",
            configuration="3d_fullres",
            backend="torchscript",
            precision="fp32",
            device="cpu",
            options=EngineOptions(classifier="lda"),
        )
        assert engine.class_names == ("0", "1", "2")

    def test_the_checkpoint_that_it_was_built_of_is_the_default(self, model, tmp_path):
        folder = shutil.copytree(model, tmp_path / "m")
        (folder / "fold_0" / "checkpoint_final.pth").rename(folder / "fold_0" / "checkpoint_best.pth")
        out = build(folder, tmp_path / "b", backend="torch", device="cpu", checkpoint="checkpoint_best.pth")
        for checkpoint in (None, "checkpoint_best.pth"):
            assert Engine.load(out, checkpoint=checkpoint).provenance[0].backend == "torch"
        with pytest.raises(BundleError, match=r"built with checkpoint checkpoint_best\.pth, not checkpoint_final\.pth"):
            Engine.load(out, checkpoint="checkpoint_final.pth")
        with pytest.raises(BundleError, match=r"built with checkpoint checkpoint_best\.pth, not checkpoint_final\.pth"):
            load_predictor([out], ModelChoice(checkpoint="checkpoint_final.pth"), "cpu")

    def test_a_zip_does_not_say_which_checkpoint_was_taken(self, multi_task_model, tmp_path):
        archive = shutil.make_archive(str(tmp_path / "model"), "zip", multi_task_model.parent, "m")
        out = build(archive, tmp_path / "b", backend="torch", device="cpu")
        assert Engine.load(out, checkpoint="checkpoint_final.pth").class_names
        with pytest.raises(BundleError, match=r"built with checkpoint model\.zip, not checkpoint_best\.pth"):
            Engine.load(out, checkpoint="checkpoint_best.pth")

    def test_its_own_hash_of_a_zip_is_the_zips(self, multi_task_model, tmp_path):
        archive = shutil.make_archive(str(tmp_path / "model"), "zip", multi_task_model.parent, "m")
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
        networks = [f"network.{ending}" for ending in ("ts", "pt2", "xml", "bin", "onnx", "json")]
        names = (*networks, "fold_0.pth", "fold_1.pth", "weights.safetensors")
        for name in names:
            (bundle / name).write_bytes(b"no network")
        manifest = json.loads((bundle / MANIFEST).read_text())
        here = {**manifest["machine"], **bundle_module.describe_machine(torch.device("cpu"))}
        change(bundle, backend=backend, machine=here, files={name: sha256(bundle / name) for name in names})
        with pytest.raises(ModelError, match=f"{backend} cannot load|(fold_0.pth|network.json) must"):
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
            ({"agreement": {"scans": 1}}, "an agreement must have scans, voxels"),
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
    def test_a_network_that_gives_something_else_than_the_plan_says(self, bundle, several_tiles, change_of):
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
            engine.predict(several_tiles)

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
