"""Classifiers fitted after training: what they answer, and what is wrong with them is named."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine import CheckpointError
from nnturbo.engine.model.heads import LinearClassifier, PooledClassifier
from nnturbo.engine.model.network import build_network
from nnturbo.engine.model.plans import parse_plan

from tests.engine.factory import dataset_json, multi_task, plans_json, pooled_classifier, random_weights
from tests.engine.model.changed_json import changed, places, values


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(places(pooled_classifier(stages=[0])))), values | st.just(...))
def test_any_change_to_a_fitted_classifier_gives_one_or_a_clear_error(path, value):
    try:
        PooledClassifier.parse(changed(pooled_classifier(stages=[0]), path, value)).make_head((4, 8))
    except CheckpointError as error:
        assert "\n" not in str(error)


class TestPooledClassifier:
    def test_it_answers_in_place_of_the_head(self):
        plans = multi_task(plans_json())
        plan, weights = parse_plan(plans, dataset_json(), "3d_fullres"), random_weights(plans, dataset_json())
        described = pooled_classifier()
        tiles = torch.randn(2, 1, 8, 12, 16)
        network = build_network(plan, weights)
        expected_seg, of_head = network.forward_multitask(tiles)
        network.head = LinearClassifier((0, 1), torch.tensor(described["weight"]), torch.tensor(described["bias"]))
        _, expected = network.forward_multitask(tiles)
        seg_logits, answers = build_network(plan, weights, PooledClassifier.parse(described)).forward_multitask(tiles)
        assert torch.equal(seg_logits, expected_seg)
        assert torch.allclose(answers, expected - expected.mean(1, keepdim=True), atol=1e-4)
        assert not torch.allclose(answers, of_head, atol=1e-2)

    def test_what_all_classes_share_costs_no_digits(self):
        described = pooled_classifier()
        features = [torch.randn(2, width, 4, 4, 4) for width in (4, 8)]
        focus = torch.rand(2, 1, 8, 8, 8)
        plain = PooledClassifier.parse(described).make_head((4, 8))(features, focus)
        shifted = {**described, "bias": [value + 2.0**20 for value in described["bias"]]}
        logits = PooledClassifier.parse(shifted).make_head((4, 8))(features, focus)
        assert (logits - plain).abs().max() < 0.1  # of the bias as it is read; without a shift of 2 ** 20 since
        assert logits.abs().max() < 1000

    def test_tensors_and_lists_read_the_same(self):
        described = pooled_classifier()
        lists = PooledClassifier.parse(described)
        tensors = {key: torch.tensor(described[key], dtype=torch.float64) for key in ("weight", "bias")}
        read = PooledClassifier.parse({**described, **tensors, "stages": (0, 1)})
        assert torch.equal(read.weight, lists.weight)
        assert torch.equal(read.bias, lists.bias)
        assert (read.stages, read.kind, read.weight.dtype) == ((0, 1), "lda", torch.float32)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"extra": 1}, "must have exactly kind, stages, weight, bias; got .*extra"),
            ({"kind": "svm"}, "kind must be lda, got 'svm'"),
            ({"kind": ["lda"]}, "kind must be lda"),
            ({"stages": 0}, "stages must be different numbers from 0, got 0"),
            ({"stages": [0, 0]}, "stages must be different numbers"),
            ({"stages": []}, "stages must be different numbers"),
            ({"weight": [[1.0], [1.0, 2.0]]}, "weight must be numbers in equal rows"),
            ({"weight": "many"}, "weight must be numbers in equal rows"),
            ({"weight": None}, "weight must be numbers in equal rows"),
            ({"bias": [10**400] * 3}, "bias must be numbers in equal rows"),
            ({"weight": [1.0, 2.0]}, r"weight must be \(classes, features\).*got \(2,\) and \(3,\)"),
            ({"bias": [1.0]}, r"weight must be .*got \(3, 36\) and \(1,\)"),
            ({"bias": [1.0, float("nan"), 0.0]}, "bias must be finite"),
            ({"bias": [1.0, 1e300, 0.0]}, "bias must be finite in float32"),
            ({"weight": torch.zeros(1).expand(3, 10**9)}, "weight must be a plain, dense tensor"),
            ({"weight": torch.zeros(3, 36).to_sparse()}, "weight must be a plain, dense tensor"),
            ({"weight": torch.zeros(3, 36, dtype=torch.complex64)}, "weight must be a plain, dense tensor"),
            ({"weight": torch.zeros(3, 36, device="meta")}, "weight must be a plain, dense tensor"),
        ],
    )
    def test_what_is_wrong_is_named(self, change, message):
        with pytest.raises(CheckpointError, match=message):
            PooledClassifier.parse({**pooled_classifier(), **change})

    def test_anything_but_a_dictionary_is_refused(self):
        with pytest.raises(CheckpointError, match="must have exactly .*; got list"):
            PooledClassifier.parse([1])

    def test_it_must_fit_the_encoder(self):
        fitted = PooledClassifier.parse(pooled_classifier())
        with pytest.raises(CheckpointError, match=r"reads stages \[0, 1\], the encoder has 1, from 0"):
            fitted.make_head((4,))
        with pytest.raises(CheckpointError, match="must have 27 features.*it has 36"):
            fitted.make_head((4, 5))
