"""From what a network says about tiles to the class of a case, with answers known by hand."""

import logging
import math

import numpy as np
import pytest
import torch
from nnturbo.engine import CheckpointError, Classification, Engine, EngineOptions, ModelError, PredictionError, Volume
from nnturbo.engine.model.classification import ClassificationScheme
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.mirroring import mirror_views
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.pipeline.sliding_window import predict_logits
from nnturbo.engine.pipeline.timing import Timings
from nnturbo.engine.pipeline.voting import Votes
from nnturbo.engine.pipeline.window import SlidingWindow

from tests.engine.factory import (
    dataset_json,
    multi_task,
    plans_2d,
    plans_json,
    pooled_classifier,
    random_weights,
    smooth_scan,
    write_model,
    zipped,
)
from tests.engine.pipeline.cases import case_of

SCHEME = ClassificationScheme(kind="gap_linear", stages=(0,), class_names=("a", "b"), focus_channels=(1,))
SPACING = (2.0, 1.5, 1.5)


def answer_of(image, runner, aggregation="foreground", *, mirror=(), per_call=1, scheme=SCHEME, patch=(4, 4, 4)):
    window = SlidingWindow(
        patch_size=patch,
        tile_step_size=1.0,
        views=mirror_views(mirror),
        views_per_call=per_call,
        slicewise=patch[0] == 1,
    )
    votes = Votes(scheme, views=len(window.views), aggregation=aggregation)
    for _ in predict_logits(case_of(image), runner, window, 2, timings=Timings(), votes=votes):
        pass
    return votes.count()


def two_channels(foreground):
    """Segmentation logits with this probability of channel 1 at every voxel."""
    return torch.stack([torch.zeros_like(foreground), torch.logit(foreground)], dim=1)


def brightness(tiles):
    """Foreground is the voxel's own value; class logits are (10 x the tile's first voxel, 1)."""
    first = tiles[:, 0].flatten(1)[:, 0]
    return NetworkOutput(two_channels(tiles[:, 0]), torch.stack([10 * first, torch.ones_like(first)], dim=1))


def blocks(values, size=4):
    """An image of constant cubes side by side along x, one for each value."""
    return np.concatenate([np.full((1, size, size, size), value, np.float32) for value in values], axis=3)


class TestAggregation:
    def test_tiles_count_by_the_foreground_they_show(self):
        answer = answer_of(blocks([0.9, 0.1, 0.5]), brightness)
        expected = (0.9 * 9 + 0.1 * 1 + 0.5 * 5) / 1.5
        assert answer.logits == pytest.approx((expected, 1), abs=1e-5)
        assert (answer.label, answer.name) == (0, "a")

    def test_all_alike_for_mean(self):
        answer = answer_of(blocks([0.9, 0.1, 0.5]), brightness, "mean")
        assert answer.logits == pytest.approx((5, 1), abs=1e-5)

    def test_one_tile_with_foreground_outweighs_many_without(self):
        image = blocks([1e-6] * 9 + [0.99])

        def runner(tiles):
            shown = tiles[:, 0].flatten(1).mean(1)
            logits = torch.where(shown > 0.5, torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
            return NetworkOutput(two_channels(tiles[:, 0]), logits)

        assert answer_of(image, runner).name == "b"
        assert answer_of(image, runner, "mean").name == "a"

    def test_plain_mean_where_nothing_is_shown(self):
        def runner(tiles):
            seg_logits = torch.stack([torch.full_like(tiles[:, 0], 200.0), torch.zeros_like(tiles[:, 0])], dim=1)
            return NetworkOutput(seg_logits, brightness(tiles).class_logits)

        assert answer_of(blocks([0.9, 0.1, 0.5]), runner).logits == pytest.approx((5, 1), abs=1e-5)

    @pytest.mark.parametrize("per_call", [1, 3, 4])
    def test_views_are_averaged_before_tiles_are_weighed(self, per_call):
        """Each view sees another corner first, and shows another amount."""
        image = np.random.default_rng(0).uniform(0.05, 0.95, size=(1, 4, 4, 8)).astype(np.float32)

        def runner(tiles):
            first = tiles[:, 0].flatten(1)[:, 0]
            return NetworkOutput(
                two_channels(first.reshape(-1, 1, 1, 1).expand(-1, 4, 4, 4)),
                torch.stack([10 * first, torch.ones_like(first)], dim=1),
            )

        answer = answer_of(image, runner, mirror=(0, 2), per_call=per_call)
        corners = np.array([[image[0, z, 0, x + 3 * flip] for z in (0, 3) for flip in (0, 1)] for x in (0, 4)])
        logits, weights = 10 * corners.mean(1), corners.mean(1)
        assert answer.logits[0] == pytest.approx((logits * weights).sum() / weights.sum(), abs=1e-5)
        per_view = (10 * corners * corners).sum() / corners.sum()
        assert abs(per_view - answer.logits[0]) > 0.01  # the other order would give something else

    def test_planes_of_a_slicewise_network_are_tiles(self):
        image = np.stack([np.full((4, 4), value, np.float32) for value in (0.2, 0.6, 0.7)])[None]
        answer = answer_of(image, brightness, patch=(1, 4, 4))
        assert answer.logits[0] == pytest.approx(10 * (0.04 + 0.36 + 0.49) / 1.5, abs=1e-5)

    def test_regions_count_by_their_sigmoid(self):
        scheme = ClassificationScheme(
            kind="gap_linear", stages=(0,), class_names=("a", "b"), focus_channels=(1,), regions=True
        )

        def runner(tiles):
            # A high logit of the other region would hide this one under a softmax.
            seg_logits = torch.stack([torch.full_like(tiles[:, 0], 50.0), torch.logit(tiles[:, 0])], dim=1)
            return NetworkOutput(seg_logits, brightness(tiles).class_logits)

        answer = answer_of(blocks([0.9, 0.1]), runner, scheme=scheme)
        assert answer.logits[0] == pytest.approx(0.9 * 9 + 0.1 * 1, abs=1e-4)

    def test_many_tiles_are_summed_in_double(self):
        """Sums of 2 million in float32 would lose the digits that are asked for here."""
        votes = Votes(SCHEME, views=1, aggregation="mean")
        for index in range(2000):
            votes.add(NetworkOutput(torch.zeros(1, 2, 1, 1, 1), torch.tensor([[1000.0 + index % 2 / 1024, 0]])))
        assert votes.mean_logits().dtype == torch.float64
        assert votes.mean_logits()[0].item() == pytest.approx(1000 + 1 / 2048, abs=1e-9)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("aggregation", ["foreground", "mean"])
    def test_class_logits_that_are_not_finite_are_refused(self, value, aggregation):
        def runner(tiles):
            output = brightness(tiles)
            output.class_logits[0, 1] = value
            return output

        with pytest.raises(PredictionError, match="class logits must be finite"):
            answer_of(blocks([0.5]), runner, aggregation)

    def test_a_runner_without_class_logits_is_refused(self):
        with pytest.raises(PredictionError, match="must give class logits"):
            answer_of(blocks([0.5]), lambda tiles: NetworkOutput(brightness(tiles).seg_logits))


class TestClassification:
    def test_probabilities_are_the_softmax_of_any_logits(self):
        answer = Classification.from_logits([1000.0, 1001.0, -5000.0], ["x", "y", "z"])
        assert (answer.label, answer.name) == (1, "y")
        assert answer.probabilities == pytest.approx((1 / (1 + math.e), math.e / (1 + math.e), 0))
        assert answer.class_names == ("x", "y", "z")

    def test_the_first_of_equal_classes_wins(self):
        assert Classification.from_logits([0.0, 2.0, 2.0], ["x", "y", "z"]).label == 1

    def test_models_are_averaged_as_probabilities(self):
        one = Classification.from_logits([math.log(0.9), math.log(0.1)], ["x", "y"])
        other = Classification.from_logits([math.log(0.3), math.log(0.7)], ["x", "y"])
        mean = Classification.average([one, other])
        assert mean.probabilities == pytest.approx((0.6, 0.4))
        assert mean.logits == pytest.approx((math.log(0.6), math.log(0.4)))

    def test_a_class_that_cannot_be_has_finite_logits(self):
        mean = Classification.average([Classification.from_logits([0.0, -5000.0], ["x", "y"])])
        assert mean.probabilities == pytest.approx((1, 0), abs=1e-300)
        assert math.isfinite(mean.logits[1])


@pytest.fixture(scope="module")
def scan():
    return Volume.from_array(smooth_scan((9, 20, 24)), SPACING, name="scan")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m", plans=multi_task(plans_json(), kind="attention"))


def load(folder, **options):
    return Engine.load(folder, device="cpu", mirror=False, options=EngineOptions(**options))


class TestEngine:
    def test_a_prediction_has_a_class_and_says_how(self, model, scan):
        prediction = Engine.load(model, device="cpu").predict(scan)
        answer = prediction.classification
        assert sum(answer.probabilities) == pytest.approx(1)
        assert answer.name == ("0", "1", "2")[answer.label]
        assert answer.probabilities[answer.label] == max(answer.probabilities)
        assert prediction.provenance[0].classifier == "head"
        assert prediction.provenance[0].aggregation == "foreground"
        assert load(model).class_names == ("0", "1", "2")

    def test_the_labels_are_those_of_the_plain_network(self, model, scan, tmp_path):
        weights = read_model(model).weights[0]
        plain = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
        folder = write_model(tmp_path / "plain", checkpoint={"network_weights": plain})
        prediction = load(folder).predict(scan)
        assert prediction.classification is None
        assert load(folder).class_names is None
        assert (prediction.provenance[0].classifier, prediction.provenance[0].aggregation) == (None, None)
        assert np.array_equal(load(model).predict(scan).segmentation, prediction.segmentation)

    def test_the_class_is_the_weighted_mean_over_the_tiles_of_the_scan(self, model, scan):
        engine = load(model)
        run, seen = engine.segmenter.runner, []

        def recorded(tiles):
            seen.append(run(tiles))
            return seen[-1]

        engine.segmenter.runner = recorded
        answer = engine.predict(scan).classification
        logits = np.concatenate([output.class_logits.double().numpy() for output in seen])
        exponents = [np.exp(output.seg_logits.double().numpy()) for output in seen]
        weights = np.array([(e[:, 2] / e.sum(1)).mean() for e in exponents])
        assert len(seen) > 8
        assert answer.logits == pytest.approx(weights @ logits / weights.sum(), abs=1e-5)
        mean = load(model, aggregation="mean").predict(scan)
        assert mean.classification.logits == pytest.approx(logits.mean(0), abs=1e-5)
        assert mean.provenance[0].aggregation == "mean"

    def test_a_2d_configuration_answers_too(self, tmp_path, scan):
        engine = load(write_model(tmp_path / "m", plans=multi_task(plans_2d())))
        prediction = engine.predict(scan)
        assert prediction.segmentation.shape == (9, 20, 24)
        assert len(prediction.classification.logits) == 3

    def test_bf16_keeps_the_class_close(self, model, scan):
        exact = load(model).predict(scan).classification
        rounded = Engine.load(model, device="cpu", mirror=False, precision="bf16").predict(scan).classification
        assert rounded.probabilities == pytest.approx(exact.probabilities, abs=0.05)

    def test_a_model_comes_back_whole_from_a_zip(self, model, scan, tmp_path):
        archive = zipped(model, tmp_path / "model.zip")
        read = read_model(archive)
        assert read.plan == read_model(model).plan
        expected = load(model).predict(scan)
        prediction = load(archive).predict(scan)
        assert prediction.classification == expected.classification
        assert np.array_equal(prediction.segmentation, expected.segmentation)


def fitted_model(tmp_path, fits, plans=None):
    """A model of one fold per entry; each entry is what the fold's checkpoint has as its fitted classifier."""
    plans = plans or multi_task(plans_json())
    folder = write_model(tmp_path / "m", plans=plans, folds=tuple(map(str, range(len(fits)))))
    for fold, fit in enumerate(fits):
        path = folder / f"fold_{fold}" / "checkpoint_final.pth"
        content = torch.load(path, weights_only=False)
        torch.save(content if fit is None else {**content, "pooled_classifier": fit}, path)
    return folder


class TestFittedClassifier:
    def test_auto_takes_it_and_head_does_not(self, tmp_path, scan):
        folder = fitted_model(tmp_path, [pooled_classifier(), pooled_classifier(seed=1)])
        predictions = {choice: load(folder, classifier=choice).predict(scan) for choice in ("auto", "lda", "head")}
        assert predictions["auto"].classification == predictions["lda"].classification
        assert predictions["auto"].provenance[0].classifier == "lda"
        assert predictions["head"].provenance[0].classifier == "head"
        assert predictions["head"].classification.logits != predictions["lda"].classification.logits
        plain = write_model(tmp_path / "plain", plans=multi_task(plans_json()), folds=("0", "1"))
        assert predictions["head"].classification == load(plain).predict(scan).classification
        assert np.array_equal(predictions["lda"].segmentation, predictions["head"].segmentation)

    def test_every_fold_answers_with_its_own(self, tmp_path, scan):
        folder = fitted_model(tmp_path, [pooled_classifier(), pooled_classifier(seed=1)])

        def logits(folds):
            engine = Engine.load(
                folder, folds=folds, device="cpu", mirror=False, options=EngineOptions(aggregation="mean")
            )
            return np.array(engine.predict(scan).classification.logits)

        assert np.allclose(logits([0, 1]), (logits([0]) + logits([1])) / 2, atol=1e-5)

    def test_auto_falls_back_to_the_head_where_a_fold_has_none_and_says_so(self, tmp_path, scan, caplog):
        folder = fitted_model(tmp_path, [pooled_classifier(), None])
        with caplog.at_level(logging.WARNING):
            engine = load(folder)
        assert "fold 1 has no fitted classifier, so the network's head answers" in caplog.text
        assert engine.provenance[0].classifier == "head"
        plain = write_model(tmp_path / "plain", plans=multi_task(plans_json()), folds=("0", "1"))
        assert engine.predict(scan).classification == load(plain).predict(scan).classification

    def test_the_choice_is_logged(self, tmp_path, caplog):
        folder = fitted_model(tmp_path, [pooled_classifier()])
        with caplog.at_level(logging.INFO, logger="nnturbo.engine.model.folder"):
            load(folder)
            load(folder, classifier="head")
        chosen = [message.split(" of ")[0] for message in caplog.messages if message.startswith("classifier ")]
        assert chosen == ["classifier lda", "classifier head"]

    @pytest.mark.parametrize("fits", [[None], [pooled_classifier(), None]])
    def test_lda_where_a_fold_has_none_is_refused(self, tmp_path, fits):
        with pytest.raises(
            ModelError, match=f"classifier lda needs .* fold {len(fits) - 1} has none.*--classifier head"
        ):
            load(fitted_model(tmp_path, fits), classifier="lda")

    def test_a_model_without_classification_ignores_both_options(self, tmp_path, scan):
        engine = load(write_model(tmp_path / "m"), classifier="lda", aggregation="mean")
        assert engine.predict(scan).classification is None

    def test_a_checkpoint_without_a_head_must_have_none(self, tmp_path):
        folder = fitted_model(tmp_path, [pooled_classifier()], plans=plans_json())
        with pytest.raises(CheckpointError, match=r"m, fold 0: only checkpoints of .* the plan names .*PlainConvUNet"):
            read_model(folder)

    def test_it_must_have_the_plans_classes(self, tmp_path):
        with pytest.raises(CheckpointError, match="must have the plan's 3 classes, it has 2"):
            read_model(fitted_model(tmp_path, [pooled_classifier(classes=2)]))

    def test_the_file_is_named_where_it_is_broken(self, tmp_path):
        folder = fitted_model(tmp_path, [{**pooled_classifier(), "kind": "svm"}])
        with pytest.raises(CheckpointError, match=r"fold_0/checkpoint_final\.pth: pooled_classifier: kind must be lda"):
            read_model(folder)

    def test_one_for_another_encoder_is_refused_unless_the_head_answers(self, tmp_path):
        wrong = pooled_classifier()
        wrong["weight"] = [row[:-1] for row in wrong["weight"]]
        folder = fitted_model(tmp_path, [wrong])
        with pytest.raises(CheckpointError, match="must have 36 features.*it has 35"):
            load(folder)
        assert load(folder, classifier="head").provenance[0].classifier == "head"

    def test_other_keys_of_a_checkpoint_are_ignored(self, tmp_path):
        folder = write_model(tmp_path / "m", checkpoint={"unheard_of": [1, {"a": None}], "pooled_classifier": None})
        assert read_model(folder).pooled_classifiers == (None,)


@pytest.mark.parametrize(("name", "value"), [("classifier", "svm"), ("aggregation", "max")])
def test_options_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        EngineOptions(**{name: value})


def test_tensors_that_are_no_plain_numbers_in_memory_are_refused(tmp_path):
    for tensor in (torch.zeros(2, device="meta"), torch.zeros(2).to_sparse()):
        weights = {**random_weights(plans_json(), dataset_json()), "a": tensor}
        with pytest.raises(CheckpointError, match="plain, dense weights, which 'a' is not"):
            read_model(write_model(tmp_path / "m", checkpoint={"network_weights": weights}))
