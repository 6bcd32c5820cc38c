"""Classes that are drawn equally often."""

from types import SimpleNamespace

import numpy as np
import pytest
from nnturbo.benchmarks.heads import draw_classes_equally


def test_every_class_has_the_same_share():
    subtypes = {"a": 0, "b": 1, "c": 1, "d": 2, "e": 2, "f": 2, "elsewhere": 0}
    loader = SimpleNamespace(indices=["f", "b", "a", "d", "c", "e"], sampling_probabilities=None)
    draw_classes_equally(loader, subtypes)
    shares = dict(zip(loader.indices, loader.sampling_probabilities.tolist(), strict=True))
    assert np.sum(loader.sampling_probabilities) == pytest.approx(1)
    assert shares == pytest.approx({"a": 1 / 3, "b": 1 / 6, "c": 1 / 6, "d": 1 / 9, "e": 1 / 9, "f": 1 / 9})
