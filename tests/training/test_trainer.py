"""The trainer inside nnU-Net: augmentation, being found, whole cases, nnU-Net's own inference and validation."""

import csv
import json
import re
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import Engine, EngineError
from nnturbo.engine.model.checkpoint import read_checkpoint
from nnturbo.engine.scans.volume import read_volume
from nnturbo.training.recipe import PRESETS, Recipe
from nnturbo.training.whole_cases import find_labelled_cases, network_engine, validate
from sklearn.metrics import f1_score

from tests.training.tiny import CONFIGURATION, TINY, import_nnunet, make_trainer, work_in_threads


def plain_dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


class TestAugmentation:
    def transforms(self, tiny, **changes):
        """The trainer's, by name of their class; those in a random order of application are unwrapped."""
        trainer = make_trainer(tiny, replace(TINY, **changes))
        trainer.initialize()
        loader, _ = trainer.get_dataloaders()
        composed = loader.data_loader.transforms if hasattr(loader, "data_loader") else loader.generator.transforms
        unwrapped = [getattr(transform, "transform", transform) for transform in composed.transforms]
        return [(type(transform).__name__, transform) for transform in unwrapped]

    def test_default_has_flipping_rotation_and_scaling_and_nothing_that_hides_texture(self, tiny, environment):
        named = dict(self.transforms(tiny, left_out=Recipe().left_out))
        assert not {"GaussianBlurTransform", "SimulateLowResolutionTransform", "GammaTransform"} & set(named)
        assert {"GaussianNoiseTransform", "MultiplicativeBrightnessTransform", "ContrastTransform"} <= set(named)
        assert named["MirrorTransform"].allowed_axes == (0, 1, 2)
        spatial = named["SpatialTransform"]
        assert (spatial.p_rotation, spatial.p_scaling) == (0.2, 0.2)
        assert spatial.scaling == (0.7, 1.4)
        assert np.rad2deg(spatial.rotation) == pytest.approx([-30, 30])

    def test_the_rest_is_nnunets_in_its_order(self, tiny, environment):
        complete = [name for name, _ in self.transforms(tiny, left_out=())]
        assert complete.count("GammaTransform") == 2
        assert {"GaussianBlurTransform", "SimulateLowResolutionTransform"} <= set(complete)
        left_out = ("GaussianNoiseTransform", "GammaTransform")
        kept = [name for name, _ in self.transforms(tiny, left_out=left_out)]
        assert kept == [name for name in complete if name not in left_out]
        assert kept[-1] == "DownsampleSegForDSTransform"

    def test_batches_fit_the_network(self, tiny, environment):
        trainer = make_trainer(tiny, replace(TINY, oversample_foreground=1.0))
        trainer.initialize()
        batch = next(trainer.get_dataloaders()[0])
        assert batch["data"].shape == (2, 1, 16, 32, 32)
        shapes = [tuple(target.shape[2:]) for target in batch["target"]]
        assert shapes == [tuple(output.shape[2:]) for output in trainer.network(batch["data"])]
        assert set(batch["keys"]) <= set(tiny.training_cases)
        assert (batch["target"][0].flatten(1) > 0).any(1).all()


class TestWholeCases:
    def test_history_has_the_engines_own_results(self, tiny, trained):
        """Of the last epoch, whose weights are the final checkpoint's: 2 of the 3 cases, without mirroring."""
        with (trained / "fold_0" / "history.csv").open(newline="") as file:
            line = list(csv.DictReader(file))[-1]
        engine = Engine.load(trained, device="cpu", mirror=False)
        cases = tiny.validation_cases[:2]
        assert cases == tuple(sorted(tiny.validation_cases))[:2]
        scores, answers = [], []
        for case in cases:
            prediction = engine.predict(tiny.image(case))
            truth = sitk.GetArrayFromImage(sitk.ReadImage(str(tiny.labels(case))))
            found = prediction.segmentation
            scores.append([plain_dice(found > 0, truth > 0), *(plain_dice(found == v, truth == v) for v in (1, 2))])
            answers.append(prediction.classification.label)
        means = np.mean(scores, axis=0)
        assert means.min() > 0  # else any network would do
        assert [float(line[name]) for name in ("foreground_dsc", "dsc_1", "dsc_2")] == pytest.approx(means, abs=1e-12)
        macro_f1 = f1_score([int(case.split("_")[1]) for case in cases], answers, average="macro")
        assert float(line["macro_f1"]) == pytest.approx(macro_f1)
        assert float(line["focus_dsc"]) == pytest.approx(means[2], abs=1e-12)  # the lesion's
        assert float(line["score"]) == pytest.approx((means[0] + means[2] + macro_f1) / 3)

    def test_it_leaves_the_network_as_it_was(self, tiny, environment):
        trainer = make_trainer(tiny, replace(TINY, validation_cases=1))
        trainer.initialize()
        trainer.network.eval()
        before = {name: weights.clone() for name, weights in trainer.network.state_dict().items()}
        random = torch.get_rng_state()
        trainer.whole_cases.validate({})
        assert trainer.network.decoder.deep_supervision
        assert all(torch.equal(weights, before[name]) for name, weights in trainer.network.state_dict().items())
        assert all(parameter.requires_grad for parameter in trainer.network.parameters())
        assert torch.equal(torch.get_rng_state(), random)

    def test_it_leaves_no_memory_behind_and_says_one_line(self, tiny, environment, monkeypatch, capsys):
        trainer = make_trainer(tiny, replace(TINY, validation_cases=1))
        trainer.initialize()
        trainer.network.eval()
        trainer.whole_cases.validate({})
        runners = []

        def watched(*arguments):
            engine = network_engine(*arguments)
            runners.append(weakref.ref(engine.segmenter.runner))
            return engine

        monkeypatch.setattr("nnturbo.training.whole_case_validation.network_engine", watched)
        capsys.readouterr()
        trainer.whole_cases.validate({})
        assert [runner() for runner in runners] == [None]
        said = capsys.readouterr().out
        assert said.count("\n") == 1
        assert re.search(
            r"Whole cases: foreground DSC 0\.\d+, lesion DSC .*, by label 1: .*, macro-F1 .*, score ", said
        )

    def test_fold_all_has_none(self, tiny, environment, capsys):
        """Its validation cases are training cases: no score, and no early end, comes from them."""
        trainer = make_trainer(tiny, replace(TINY, epochs=1, iterations=1), fold="all")
        trainer.run_training()
        assert trainer.schedule.anneal_from is None
        assert [set(line) & {"score", "foreground_dsc"} for line in trainer.history] == [set()]
        assert capsys.readouterr().out.count("Fold all trains on every case: none is left to validate on, all 1") == 1
        assert not (Path(trainer.output_folder) / "checkpoint_best_score.pth").exists()

    def test_what_is_to_be_ignored_does_not_count(self, tiny, trained, tmp_path):
        """Where the prediction is wrong the reference says ignore: all that is left agrees."""
        engine = Engine.load(trained, device="cpu", mirror=False)
        found = engine.predict(tiny.image(tiny.validation_cases[0])).segmentation.copy()
        cases = find_labelled_cases(tiny.raw / tiny.name, tiny.validation_cases[:1], tiny.dataset, {"quiz_0_008": 0})
        wrong = np.zeros(found.shape, bool)
        wrong[10:20, 10:20] = True
        reference = sitk.GetImageFromArray(np.where(wrong, 3, found).astype(np.uint8))
        reference.CopyInformation(sitk.ReadImage(str(cases[0].labels)))
        sitk.WriteImage(reference, str(tmp_path / "labels.nii.gz"))
        case = replace(cases[0], labels=tmp_path / "labels.nii.gz")
        assert validate(engine, [case], ["lesion"]).foreground_dsc < 1
        dataset = tiny.dataset | {"labels": tiny.dataset["labels"] | {"ignore": 3}}
        plans = json.loads((trained / "plans.json").read_text())
        network = engine.segmenter.runner._network.networks[0]
        ignoring = network_engine(network, plans, dataset, CONFIGURATION, torch.device("cpu"))
        result = validate(ignoring, [case], ["lesion"])
        assert result.foreground_dsc == result.focus_dsc == 1
        assert result.label_dsc == {1: 1, 2: 1}

    def test_scans_may_lie_where_the_data_set_says(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SCANS", str(tmp_path / "scans"))
        for path in ("scans/a_ct.nii.gz", "raw/masks/a.nii.gz"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        dataset = {
            "channel_names": {"0": "CT"},
            "file_ending": ".nii.gz",
            "dataset": {"a": {"images": ["$SCANS/a_ct.nii.gz"], "label": "masks/a.nii.gz"}},
        }
        (case,) = find_labelled_cases(tmp_path / "raw", ["a"], dataset, {"a": 2})
        assert case.images == (tmp_path / "scans" / "a_ct.nii.gz",)
        assert case.labels == tmp_path / "raw" / "masks" / "a.nii.gz"
        assert (case.name, case.subtype) == ("a", 2)


class TestInsideNnunet:
    def test_it_is_found_through_the_environment(self, tiny, found_by_nnunet):
        trainer_class = found_by_nnunet("nnUNetTrainerMultiTask")
        assert trainer_class is import_nnunet().nnUNetTrainerMultiTask
        with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer nnUNetTrainerOther"):
            found_by_nnunet("nnUNetTrainerOther")

    @pytest.mark.parametrize("preset", ["conservative", "aggressive", "segmentation_focused"])
    def test_its_command_chooses_a_preset_by_the_trainers_name(self, tiny, environment, found_by_nnunet, preset):
        trainer_class = found_by_nnunet(f"nnUNetTrainerMultiTask_{preset}")
        plans = json.loads(json.dumps(tiny.plans)) | {"continue_training": False}
        trainer = trainer_class(plans, CONFIGURATION, 0, tiny.dataset, torch.device("cpu"))
        assert trainer.recipe == PRESETS[preset]
        assert f"nnUNetTrainerMultiTask_{preset}__" in trainer.output_folder

    def test_plans_without_a_recipe_are_trained_with_the_balanced_one(self, tiny, environment):
        """As nnU-Net's own command does it, whose planner knows of no recipe."""
        plans = json.loads(json.dumps(tiny.plans)) | {"continue_training": False}
        trainer_class = import_nnunet().nnUNetTrainerMultiTask
        trainer = trainer_class(plans, CONFIGURATION, 0, tiny.dataset, torch.device("cpu"))
        assert trainer.recipe == Recipe()
        assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (120, 250)

    @pytest.mark.parametrize(
        ("sums", "share"),
        # After four steps labels nearly tie: nnU-Net's fp16 sums over tiles decide otherwise here and there.
        [("fp32", 1 / 50_000), ("fp16", 1 / 500)],
    )
    def test_its_predictor_gives_the_engines_labels(self, tiny, trained, found_by_nnunet, sums, share):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nnU-Net's imports
            from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

            from tests.parity.fp32 import Fp32Predictor
        case = tiny.validation_cases[2]
        predictor = (Fp32Predictor if sums == "fp32" else nnUNetPredictor)(
            device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predictor.initialize_from_trained_model_folder(str(trained), use_folds=(0,))
            assert predictor.allowed_mirroring_axes == (0, 1, 2)
            volume = read_volume(tiny.image(case), channels=1)
            properties = {"spacing": list(volume.geometry.spacing)}
            stock = predictor.predict_single_npy_array(volume.array.astype(np.float32), properties)
        ours = Engine.load(trained, device="cpu").predict(tiny.image(case)).segmentation
        assert stock.shape == ours.shape
        assert len(np.unique(ours)) > 1
        assert (stock != ours).sum() <= ours.size * share

    def test_its_final_validation(self, tiny, trained, environment, monkeypatch):
        trainer = make_trainer(tiny, TINY)
        trainer.load_checkpoint(str(trained / "fold_0" / "checkpoint_final.pth"))
        case = tiny.validation_cases[0]  # one is enough
        trainer.do_split = lambda: (list(tiny.training_cases), [case])
        with warnings.catch_warnings(), monkeypatch.context() as patch:
            warnings.simplefilter("ignore")  # of nnU-Net, about classes without voxels and the like
            work_in_threads(patch)
            trainer.perform_actual_validation()
        summary = json.loads((Path(trainer.output_folder) / "validation" / "summary.json").read_text())
        engine = Engine.load(trained, device="cpu")
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(tiny.labels(case))))
        found = engine.predict(tiny.image(case)).segmentation
        (of_case,) = (row["metrics"] for row in summary["metric_per_case"])
        for label in (1, 2):
            assert of_case[str(label)]["Dice"] == pytest.approx(plain_dice(found == label, truth == label), abs=0.002)
        assert summary["foreground_mean"]["Dice"] > 0


class TestPretrained:
    """Beginning with trained weights: encoder and decoder are taken, the head where it is of the same form."""

    def begin(self, tiny, weights, **changes):
        trainer = make_trainer(tiny, replace(TINY, **changes))
        trainer.begin_with(weights)
        return trainer.network.state_dict(), trainer

    def test_weights_are_taken_and_optimizers_hold_them(self, tiny, trained, environment):
        weights = read_checkpoint(trained / "fold_0" / "checkpoint_final.pth").weights
        got, trainer = self.begin(tiny, weights)
        assert all(torch.equal(got[name], weights[name]) for name in got)
        held = {id(p) for o in (trainer.optimizer, trainer.head_optimizer) for g in o.param_groups for p in g["params"]}
        assert held == {id(parameter) for parameter in trainer.network.parameters()}
        assert trainer.current_epoch == 0

    def test_another_head_begins_untrained(self, tiny, trained, environment):
        weights = read_checkpoint(trained / "fold_0" / "checkpoint_final.pth").weights
        got, _ = self.begin(tiny, weights, head_hidden=16)
        assert all(torch.equal(got[name], weights[name]) for name in got if not name.startswith("head."))
        assert got["head.queries"].shape != weights["head.queries"].shape

    def test_another_network_is_refused(self, tiny, trained, environment):
        weights = dict(read_checkpoint(trained / "fold_0" / "checkpoint_final.pth").weights)
        name = "decoder.seg_layers.2.weight"
        weights[name] = weights[name][:2]
        with pytest.raises(EngineError, match=f"must be of the same network, .*; 1 are .*, such as {name}"):
            self.begin(tiny, weights)
