"""Each model kind on each of its scans: nnturbo against nnU-Net itself, run in the same process."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

pytest.importorskip("nnunetv2", reason="compares with nnU-Net itself, which is not installed")

from tests.parity.catalogue import PLAIN_CT
from tests.parity.comparison import Comparison, allowed_voxels, beyond_rounding, compare
from tests.parity.model_folders import ModelFolder, build_model_folder
from tests.parity.report import ParityRow
from tests.parity.tasks import CROPS, SYNTHETIC, Task, synthetic_task, trained_task
from tests.paths import SHARED

PROBABILITY_TOLERANCE = 2e-3
STEEPEST_SOFTMAX = 0.5
"""A probability moves by at most half of what logits move by; a sigmoid's by a quarter."""
GEOMETRY_TOLERANCE = 1e-5
FURTHER_KINDS = {
    *("nonlin_not_there_residual", "random_weights", "2d_deep", "2d_mirrored", "2d_transposed", "2d_residual"),
    *("regions_as_floats", "254_labels", "cascade_transposed", "cascade_linear_z", "cascade_cubic", "cascade_deep"),
    *("transposed_102", "linear_z", "square", "quartic", "cubic_logits_of_order_5", "torch_never_separate_z"),
    *("2d_residual_both_ways", "2d_odd_channels", "odd_channels_residual"),
    *("mirror_plane", "two_folds_mirrored", "step_0.75", "orig_mod_prefix", "old_plans_residual", "mixed_resampling"),
}
"""Whose features are each in another kind too."""


class ModelFolders:
    """Model folders, each built when a test first needs it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.built: dict[str, ModelFolder] = {}

    def of(self, name: str) -> ModelFolder:
        """Build the model of a synthetic task, unless a task before had the same."""
        kind, _ = SYNTHETIC[name]
        if kind.name not in self.built:
            self.built[kind.name] = build_model_folder(kind, self.root / kind.name)
        return self.built[kind.name]


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    return ModelFolders(tmp_path_factory.mktemp("models"))


def make_task(name: str, model_folders: ModelFolders, folder: Path) -> Task:
    if name in SYNTHETIC:
        return synthetic_task(name, *SYNTHETIC[name], model_folders.of(name), folder)
    if not SHARED.is_dir():
        pytest.skip(f"needs real scans and a trained model in {SHARED}")
    return trained_task(CROPS[name], folder)


def parameter(name: str):
    """Mark a task as thorough, unless it is the plainest model's, or the first of a feature or with real scans."""
    if name in CROPS:
        is_thorough = name != next(iter(CROPS))
    else:
        kind, scan = SYNTHETIC[name]
        is_thorough = kind != PLAIN_CT and (scan != kind.scans[0] or kind.name in FURTHER_KINDS)
    return pytest.param(name, marks=pytest.mark.thorough if is_thorough else ())


@pytest.fixture(scope="module", params=[*map(parameter, [*SYNTHETIC, *CROPS])])
def comparison(
    request: pytest.FixtureRequest,
    model_folders: ModelFolders,
    tmp_path_factory: pytest.TempPathFactory,
    parity_rows: list[ParityRow],
) -> Comparison:
    folder = tmp_path_factory.mktemp("case")
    result = compare(make_task(request.param, model_folders, folder), folder)
    row = ParityRow(
        name=request.param,
        voxels=result.labels.size,
        differ_from_stock=int(result.differs_from_stock.sum()),
        differ_from_fp32_stock=int(result.differs_from_exact.sum()),
        stock_differs_from_fp32_stock=int((result.stock.segmentation != result.exact.segmentation).sum()),
    )
    parity_rows.append(row)
    return result


def skip_unless_bounded(comparison: Comparison) -> None:
    if comparison.task.name.startswith("cubic_logits"):
        pytest.skip("a bound on logits does not survive a cubic spline, whose weights are partly negative")


def test_labels_are_those_of_nnunet_with_fp32_sums(comparison: Comparison):
    differing = np.count_nonzero(comparison.differs_from_exact)
    assert differing <= allowed_voxels(comparison.labels.size)


def test_labels_differ_from_nnunet_only_by_its_rounding(comparison: Comparison):
    skip_unless_bounded(comparison)
    differing = np.count_nonzero(comparison.differs_from_stock)
    differing_on_box = np.count_nonzero(comparison.on_network_box(comparison.differs_from_stock))
    assert differing == differing_on_box, "labels differ outside the cropped scan"
    unexplained = np.count_nonzero(beyond_rounding(comparison))
    assert unexplained == 0


def test_probabilities_are_those_of_nnunet_with_fp32_sums(comparison: Comparison):
    np.testing.assert_allclose(
        comparison.probabilities, comparison.exact.probabilities, rtol=0, atol=PROBABILITY_TOLERANCE
    )


def test_probabilities_differ_from_nnunet_only_by_its_rounding(comparison: Comparison):
    skip_unless_bounded(comparison)
    pairs = zip(comparison.probabilities, comparison.stock.probabilities, strict=True)
    error = np.stack([comparison.on_network_box(np.abs(ours - stock)) for ours, stock in pairs])
    allowed = PROBABILITY_TOLERANCE + STEEPEST_SOFTMAX * comparison.rounding.max(axis=0)
    unexplained = np.count_nonzero(error > allowed)
    assert unexplained == 0


def test_asking_for_probabilities_keeps_the_labels(comparison: Comparison):
    assert comparison.prediction.probabilities is None
    assert comparison.prediction_with_probabilities.probabilities.dtype == np.float32
    with_probabilities = comparison.prediction_with_probabilities.segmentation
    differing = np.count_nonzero(with_probabilities != comparison.prediction.segmentation)
    assert differing <= allowed_voxels(with_probabilities.size)


def test_file_is_as_nnunet_writes_it(comparison: Comparison):
    ours, stock = sitk.ReadImage(comparison.file), sitk.ReadImage(comparison.stock_file)
    assert ours.GetSize() == stock.GetSize()
    # Deliberately different above 254 labels: stock chooses by the greatest voxel, so that files of one job can differ.
    if comparison.stock.segmentation.dtype == np.uint8:
        assert ours.GetPixelIDTypeAsString() == stock.GetPixelIDTypeAsString()
    else:
        assert ours.GetPixelIDTypeAsString() == "16-bit unsigned integer"
    np.testing.assert_allclose(ours.GetSpacing(), stock.GetSpacing(), rtol=0, atol=GEOMETRY_TOLERANCE)
    np.testing.assert_allclose(ours.GetOrigin(), stock.GetOrigin(), rtol=0, atol=GEOMETRY_TOLERANCE)
    np.testing.assert_allclose(ours.GetDirection(), stock.GetDirection(), rtol=0, atol=GEOMETRY_TOLERANCE)


def test_file_holds_the_segmentation_on_the_scans_grid(comparison: Comparison):
    segmentation = comparison.prediction.segmentation
    assert segmentation.dtype == comparison.stock.segmentation.dtype
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(comparison.file)), segmentation)
    assert segmentation.shape == sitk.ReadImage(comparison.task.files[0]).GetSize()[::-1]
