"""Weights and loss of the classification against numpy, and that a head can learn with them."""

import numpy as np
import pytest
import torch
from nnturbo.engine.model.classification import ClassificationScheme
from nnturbo.engine.model.heads import make_head
from nnturbo.training.class_loss import class_loss, class_weights, content_weights, shown_content
from nnturbo.training.recipe import Recipe

LABELS = ClassificationScheme(kind="gap_linear", stages=(0,), class_names=("a", "b", "c"), focus_channels=(2,))
REGIONS = ClassificationScheme(
    kind="gap_linear", stages=(0,), class_names=("a", "b", "c"), focus_channels=(1,), regions=True
)


def test_class_weights_make_classes_count_the_same():
    labels = [0] * 62 + [1] * 106 + [2] * 84
    weights = class_weights(labels, 3)
    assert weights.dtype == torch.float32
    assert weights.numpy() == pytest.approx(252 / (3 * np.array([62, 106, 84])), rel=1e-6)
    assert np.bincount(labels, weights=weights.numpy()[labels]) == pytest.approx([84, 84, 84], rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "counts"), [([0, 0, 2], "[2, 0, 1]"), ([], "[0, 0, 0]"), ([0, 1, 3], "[1, 1, 0, 1]")]
)
def test_every_class_needs_a_training_case(labels, counts):
    with pytest.raises(ValueError, match="every class must have a training case, counts by class are") as caught:
        class_weights(labels, 3)
    assert str(caught.value).endswith(counts)


class TestContent:
    def test_of_labels(self):
        target = torch.zeros(4, 1, 3, 4, 5, dtype=torch.int16)
        target[0, 0, 1, 1, 1], target[0, 0, 2, 2, 2] = 1, 2
        target[1, 0, 0, 0, 0] = 1
        target[2, 0, 1, 2, 3] = 2
        focus, foreground = shown_content(target, LABELS, None)
        assert focus.shape == foreground.shape == (4, 3, 4, 5)
        assert np.array_equal(focus.numpy(), target[:, 0].numpy() == 2)
        assert np.array_equal(foreground.numpy(), target[:, 0].numpy() > 0)
        assert content_weights(focus, foreground, 0.3).tolist() == pytest.approx([1, 0.3, 1, 0])

    def test_what_is_to_be_ignored_shows_nothing(self):
        target = torch.zeros(3, 1, 2, 2, 2)
        target[0] = 3
        target[1, 0, 0, 0, 0], target[1, 0, 1, 1, 1] = 3, 1
        target[2, 0, 0, 0, 0], target[2, 0, 1, 1, 1] = 3, 2
        focus, foreground = shown_content(target, LABELS, 3)
        assert content_weights(focus, foreground, 0.25).tolist() == [0, 0.25, 1]

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    def test_of_regions(self, dtype):
        target = torch.zeros(3, 2, 2, 2, 2, dtype=dtype)
        target[0, :, 0, 0, 0] = 1
        target[1, 0, 0, 0, 0] = 1
        focus, foreground = shown_content(target, REGIONS, None)
        assert content_weights(focus, foreground, 0.5).tolist() == [1, 0.5, 0]

    def test_of_regions_with_an_ignore_label(self):
        """nnU-Net puts what is to be ignored into one more channel at the end."""
        target = torch.zeros(4, 3, 2, 2, 2, dtype=torch.bool)
        target[0, 2] = True
        target[1, 2, 0], target[1, 0, 1] = True, True
        target[2, 2, 0], target[2, 1, 1] = True, True
        target[3, 1:, 0] = True
        focus, foreground = shown_content(target, REGIONS, 3)
        assert content_weights(focus, foreground, 0.5).tolist() == [0, 0.5, 1, 0]


def numpy_class_loss(logits, labels, by_class, by_content, smoothing):
    """Cross-entropy with the label's share 1 - s + s / S and the others' s / S, each weighted by its class."""
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    shares = np.full(logits.shape, smoothing / logits.shape[1])
    shares[np.arange(len(labels)), labels] += 1 - smoothing
    return (-(shares * by_class * log_probabilities).sum(1) * by_content).sum() / len(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_loss_against_numpy(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (5, 3)), np.array([0, 1, 2, 1, 0])
    by_class, by_content = np.array([0.5, 1.0, 2.0]), np.array([1, 0.3, 0, 1, 0.3])
    loss = class_loss(
        torch.tensor(logits),
        torch.tensor(labels),
        torch.tensor(by_class).float(),
        torch.tensor(by_content).float(),
        smoothing,
    )
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(numpy_class_loss(logits, labels, by_class, by_content, smoothing), rel=1e-5)


def test_patches_that_show_nothing_have_no_gradient():
    logits = torch.randn(3, 3, requires_grad=True)
    class_loss(logits, torch.tensor([0, 1, 2]), torch.ones(3), torch.tensor([1.0, 0.0, 0.3]), 0.1).backward()
    assert torch.equal(logits.grad[1], torch.zeros(3))
    assert (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("kind", ["gap_linear", "gap_mlp", "attention"])
def test_a_head_does_not_collapse_on_classes_that_can_be_told_apart(kind):
    """The recipe's head optimizer, clip, smoothing and weights learn what separates unequal classes."""
    torch.manual_seed(0)
    recipe = Recipe()
    scheme = ClassificationScheme(
        kind=kind, stages=(0, 1), class_names=("a", "b", "c"), focus_channels=(2,), hidden=16, queries=2
    )
    head = make_head(scheme, (6, 8))
    labels = torch.tensor([0] * 4 + [1] * 12 + [2] * 8)
    means = 3 * torch.randn(14) + 0.5 * torch.randn(3, 14)  # much in common, so that a fresh head sees one class
    features = [
        means[labels, part][:, :, None, None, None] + 0.5 * torch.randn(24, width, 4, 4, 4)
        for part, width in ((slice(0, 6), 6), (slice(6, 14), 8))
    ]
    focus = torch.rand(24, 1, 4, 4, 4)
    by_class = class_weights(labels.tolist(), 3)
    rate = 10 * recipe.head_learning_rate  # few steps
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=recipe.head_weight_decay)

    def accuracy():
        with torch.inference_mode():
            return (head.eval()(features, focus).argmax(1) == labels).float().mean().item()

    assert accuracy() <= 0.5
    for _ in range(150):
        optimizer.zero_grad()
        loss = class_loss(head.train()(features, focus), labels, by_class, torch.ones(24), recipe.label_smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), recipe.head_gradient_clip)
        optimizer.step()
    assert accuracy() == 1
