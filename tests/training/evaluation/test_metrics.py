"""Measures against hand-computed values, brute force, and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnturbo.training.evaluation.metrics import (
    bootstrap_macro_f1,
    bootstrap_mean,
    classification_metrics,
    compare_structure,
    dice,
    normalised_surface_dice,
    surface,
)
from sklearn import metrics as sklearn_metrics


def block(shape, *slices):
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


def brute_surface(mask):
    """Look at the six neighbours of each voxel."""
    found = []
    for voxel in np.argwhere(mask):
        for step in (*np.eye(3, dtype=int), *-np.eye(3, dtype=int)):
            neighbour = voxel + step
            is_inside = (neighbour >= 0).all() and (neighbour < mask.shape).all()
            if not (is_inside and mask[tuple(neighbour)]):
                found.append(voxel)
                break
    return np.array(found)


def brute_nsd(prediction, reference, spacing, tolerance_mm):
    ours, theirs = brute_surface(prediction) * spacing, brute_surface(reference) * spacing
    distances = np.linalg.norm(ours[:, None] - theirs[None], axis=2)
    near = (distances.min(axis=1) <= tolerance_mm + 1e-6).sum() + (distances.min(axis=0) <= tolerance_mm + 1e-6).sum()
    return near / (len(ours) + len(theirs))


class TestDice:
    def test_of_blocks(self):
        # 8 voxels and 12, of which 4 are common: 2 * 4 / 20.
        a = block((4, 4, 4), slice(0, 2), slice(0, 2), slice(0, 2))
        b = block((4, 4, 4), slice(1, 4), slice(0, 2), slice(0, 2))
        assert dice(a, b) == dice(b, a) == pytest.approx(0.4)

    def test_at_its_ends(self):
        a, empty = block((3, 3, 3), 1), np.zeros((3, 3, 3), bool)
        assert dice(a, a) == 1
        assert dice(a, block((3, 3, 3), 2)) == 0
        assert dice(a, empty) == dice(empty, a) == 0
        assert dice(empty, empty) == 1


class TestSurfaceDice:
    def test_surface_of_a_block_is_its_shell(self):
        mask = block((7, 7, 7), slice(1, 6), slice(1, 6), slice(1, 6))
        assert surface(mask).sum() == 5**3 - 3**3

    def test_what_touches_the_border_of_the_array_is_surface(self):
        assert surface(np.ones((5, 5, 5), bool)).sum() == 5**3 - 3**3

    @pytest.mark.parametrize(("spacing", "expected"), [(1.0, (1.0, 1.0)), (1.5, (0.0, 1.0)), (2.5, (0.0, 0.0))])
    def test_of_planes_one_step_apart(self, spacing, expected):
        a, b = block((4, 5, 5), 1), block((4, 5, 5), 2)
        assert normalised_surface_dice(a, b, (spacing, 1, 1)) == expected

    def test_tolerance_includes_its_end_in_spite_of_rounding(self):
        a, b = block((5, 3, 3), 0), block((5, 3, 3), 3)
        assert normalised_surface_dice(a, b, (0.7, 9, 9), (2.1, 2.09)) == (1.0, 0.0)

    def test_at_its_ends(self):
        a, empty = block((4, 4, 4), 1), np.zeros((4, 4, 4), bool)
        assert normalised_surface_dice(a, a, (1, 1, 1)) == (1.0, 1.0)
        assert normalised_surface_dice(a, empty, (1, 1, 1)) == normalised_surface_dice(empty, a, (1, 1, 1)) == (0, 0)
        assert normalised_surface_dice(empty, empty, (1, 1, 1)) == (1.0, 1.0)

    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        shape=st.tuples(*[st.integers(1, 7)] * 3),
        spacing=st.tuples(*[st.sampled_from([0.45, 0.7, 1.0, 1.3, 3.0])] * 3),
        shares=st.tuples(*[st.sampled_from([0.1, 0.5, 0.9])] * 2),
    )
    def test_against_brute_force(self, seed, shape, spacing, shares):
        rng = np.random.default_rng(seed)
        a, b = (rng.random(shape) < share for share in shares)
        a.flat[rng.integers(a.size)] = b.flat[rng.integers(b.size)] = True
        expected = [brute_nsd(a, b, spacing, tolerance) for tolerance in (1.0, 2.0)]
        np.testing.assert_allclose(normalised_surface_dice(a, b, spacing), expected)


def test_structure_has_volumes_in_ml():
    a, b = block((4, 4, 4), slice(0, 2)), block((4, 4, 4), 1)
    found = compare_structure(a, b, (5.0, 2.0, 1.0))
    assert (found.predicted_ml, found.reference_ml) == (pytest.approx(0.32), pytest.approx(0.16))
    assert found.dsc == pytest.approx(2 / 3)
    assert (found.nsd_1mm, found.nsd_2mm) == normalised_surface_dice(a, b, (5.0, 2.0, 1.0))


class TestClassification:
    def test_by_hand(self):
        found = classification_metrics([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, None])
        assert found.confusion == ((1, 1, 0, 0), (0, 2, 0, 0), (0, 0, 1, 1))
        assert found.f1 == pytest.approx((2 / 3, 4 / 5, 2 / 3))
        assert found.macro_f1 == pytest.approx((2 / 3 + 4 / 5 + 2 / 3) / 3)
        assert found.balanced_accuracy == pytest.approx((0.5 + 1 + 0.5) / 3)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
    @pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
    def test_against_sklearn(self, pairs):
        truth, predicted = zip(*pairs, strict=True)
        found = classification_metrics(truth, predicted)
        assert found.macro_f1 == pytest.approx(sklearn_metrics.f1_score(truth, predicted, average="macro"))
        assert found.balanced_accuracy == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, predicted))
        confusion = sklearn_metrics.confusion_matrix(truth, predicted, labels=[0, 1, 2])
        np.testing.assert_array_equal(np.array(found.confusion)[:, :3], confusion)
        each = sklearn_metrics.f1_score(truth, predicted, average=None, labels=[0, 1, 2], zero_division=np.nan)
        np.testing.assert_allclose([np.nan if value is None else value for value in found.f1], each)

    def test_missing_predictions_are_wrong(self):
        truth, predicted = [0, 1, 2, 2], [0, 1, None, 2]
        found = classification_metrics(truth, predicted)
        as_other = [3 if guess is None else guess for guess in predicted]
        expected = sklearn_metrics.f1_score(truth, as_other, average="macro", labels=[0, 1, 2])
        assert found.macro_f1 == pytest.approx(expected)

    def test_at_its_ends(self):
        assert classification_metrics([0, 1, 2], [0, 1, 2]).macro_f1 == 1
        assert classification_metrics([0, 1, 2], [None] * 3).macro_f1 == 0
        assert classification_metrics([0, 0], [0, 0]).f1 == (1.0, None, None)


class TestBootstrap:
    def test_of_a_mean_is_that_of_the_normal_distribution(self):
        values = np.random.default_rng(0).normal(0.5, 0.1, 400)
        found = bootstrap_mean(values, resamples=4000, seed=1)
        half = 1.96 * values.std() / 20
        assert (found.low, found.high) == (
            pytest.approx(values.mean() - half, abs=0.1 * half),
            pytest.approx(values.mean() + half, abs=0.1 * half),
        )

    @pytest.mark.parametrize("seed", range(3))
    def test_holds_the_estimate_and_shrinks_with_more_cases(self, seed):
        rng = np.random.default_rng(seed)
        widths = []
        for count in (20, 200, 2000):
            truth = rng.integers(0, 3, count)
            predicted = np.where(rng.random(count) < 0.7, truth, rng.integers(0, 3, count)).tolist()
            estimate = classification_metrics(truth, predicted).macro_f1
            found = bootstrap_macro_f1(truth, predicted, resamples=500, seed=seed)
            mean = bootstrap_mean(rng.random(count), resamples=500, seed=seed)
            assert found.low < estimate < found.high
            widths.append((found.high - found.low, mean.high - mean.low))
        assert (np.diff(widths, axis=0) < 0).all()

    def test_is_that_of_resampling_one_by_one(self):
        truth, predicted = [0, 0, 1, 1, 2, 2, 2], [0, 1, 1, None, 2, 2, 0]
        rng = np.random.default_rng(5)
        each = [
            classification_metrics([truth[i] for i in drawn], [predicted[i] for i in drawn]).macro_f1
            for drawn in rng.integers(0, 7, (4000, 7))
        ]
        found = bootstrap_macro_f1(truth, predicted, resamples=4000, seed=0)
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(each, (2.5, 97.5))), abs=0.03)

    def test_repeats_with_its_seed(self):
        values = np.random.default_rng(0).random(30)
        assert bootstrap_mean(values, resamples=50, seed=3) == bootstrap_mean(values, resamples=50, seed=3)
        assert bootstrap_mean(values, resamples=50, seed=3) != bootstrap_mean(values, resamples=50, seed=4)

    def test_of_one_case_is_a_point(self):
        assert bootstrap_macro_f1([1], [1], resamples=10, seed=0).low == 1
