"""The geometry that seeds give, and settings that give none."""

import numpy as np
import pytest
from nnturbo.training.phantoms.phantom import generate_phantom
from nnturbo.training.phantoms.phantom_settings import SMALL_SETTINGS, PhantomSettings, draw_geometry


class TestGeometry:
    def test_follows_the_pancreas_data_set(self):
        grids = [draw_geometry(seed) for seed in range(400)]
        shapes = np.array([grid.shape for grid in grids])
        spacings = np.array([grid.spacing for grid in grids])
        expected = np.array([(37, 86, 134), (63.5, 119, 179), (148, 166, 244)])
        tolerance = np.array([(0.2, 0.08, 0.08), (0.1, 0.05, 0.05), (0.15, 0.08, 0.08)])
        assert (abs(np.percentile(shapes, (5, 50, 95), axis=0) / expected - 1) < tolerance).all()
        assert np.median(spacings, axis=0) == pytest.approx((2.0, 0.732, 0.732), rel=0.02)
        assert (spacings.min(0) >= (0.45, 0.33, 0.33)).all()
        assert (spacings.max(0) <= (8.0, 0.98, 0.98)).all()
        assert np.mean(spacings[:, 0] == 3.0) == pytest.approx(76 / 288, abs=0.07)
        assert (shapes.max(0) <= (244, 272, 459)).all()

    def test_extents_are_those_of_a_region_around_the_pancreas(self):
        extents = np.array([draw_geometry(seed).extent_mm for seed in range(400)])
        assert (np.percentile(extents, 1, axis=0) > (70, 55, 90)).all()
        assert (np.percentile(extents, 99, axis=0) < (220, 135, 185)).all()

    def test_small_settings_stay_small(self):
        for seed in range(50):
            grid = draw_geometry(seed, SMALL_SETTINGS)
            assert (np.array(grid.shape) >= (32, 80, 110)).all()
            assert (np.array(grid.shape) <= (48, 110, 140)).all()

    def test_smallest_region_holds_a_lesion(self):
        tight = PhantomSettings(extent_mm=(66, 54, 80), extent_spread=(0, 0, 0), smallest_shape=(5, 20, 30))
        for seed in range(4):
            assert set(np.unique(generate_phantom(seed, settings=tight).mask)) == {0, 1, 2}

    def test_refuses_a_region_too_small_for_a_pancreas(self):
        with pytest.raises(ValueError, match=r"a region must be at least \(40.0, 40.0, 60.0\) mm"):
            draw_geometry(0, PhantomSettings(extent_mm=(30, 30, 30), smallest_shape=(5, 20, 30)))

    def test_is_the_phantom_s(self, phantoms):
        for seed, phantom in enumerate(phantoms[:5]):
            grid = draw_geometry(seed, SMALL_SETTINGS)
            assert (phantom.image.shape, phantom.spacing) == (grid.shape, grid.spacing)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"extent_mm": (0, 87, 131)}, "extent_mm must be positive"),
        ({"slice_spacings_mm": ((-1, 1),)}, "spacings must be positive"),
        ({"painting_mm": float("nan")}, "painting_mm must be positive"),
        ({"subtype_shares": (0, 0, 0)}, "subtype_shares must be non-negative"),
        ({"other_weight": -1}, "weights of slice spacings must be non-negative"),
        ({"in_plane_mm": (0.9, 0.7, 0.98)}, "in_plane_mm must ascend"),
        ({"noise_hu": (-3, 5)}, "noise_hu must ascend and not be negative"),
        ({"smallest_shape": (300, 48, 80)}, "smallest_shape must be at least 2"),
        ({"separation": -0.5}, "separation must be a finite number"),
    ],
)
def test_refuses_bad_settings(change, text):
    with pytest.raises(ValueError, match=text):
        PhantomSettings(**change)
