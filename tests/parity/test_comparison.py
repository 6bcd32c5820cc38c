"""The comparison itself: it must see a wrong label, and tell it from one that stock's rounding explains."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="compares with nnU-Net itself, which is not installed")

from tests.parity.comparison import Comparison, beyond_rounding, compare
from tests.parity.model_folders import build_model_folder
from tests.parity.tasks import SYNTHETIC, synthetic_task


@pytest.fixture(scope="module", params=["transposed_201-oblique", "regions_ignore-small"])
def comparison(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder: Path = tmp_path_factory.mktemp("case")
    kind, scan = SYNTHETIC[request.param]
    return compare(synthetic_task(request.param, kind, scan, build_model_folder(kind, folder), folder), folder)


def test_labels_of_stock_with_fp32_sums_are_within_rounding(comparison: Comparison):
    exact = replace(comparison, labels=comparison.exact.segmentation)
    assert np.count_nonzero(exact.differs_from_stock) > 0
    assert np.count_nonzero(beyond_rounding(exact)) == 0


def test_a_wrong_label_where_the_model_is_sure_is_beyond_rounding(comparison: Comparison):
    logits = comparison.exact.scan_logits
    regions = comparison.predictor.label_manager.has_regions
    sureness = np.abs(logits).min(axis=0) if regions else np.diff(np.sort(logits, axis=0)[-2:], axis=0)[0]
    labels = comparison.stock.segmentation.copy()
    on_box = comparison.on_network_box(labels)
    on_box[np.unravel_index(sureness.argmax(), sureness.shape)] ^= 1
    assert np.count_nonzero(beyond_rounding(replace(comparison, labels=labels))) == 1
