"""Shapes and noise on a grid."""

import numpy as np
import pytest
from nnturbo.training.phantoms.painting import (
    Ellipsoid,
    Grid,
    Structure,
    coverage,
    draw_noise,
    paint,
    smooth_noise,
    tube,
)


class TestPainting:
    grid = Grid(shape=(40, 50, 60), spacing=(1.5, 1.0, 0.8))

    def volume_ml(self, shape):
        box, distance = shape.distance(self.grid, 4.0)
        share = np.zeros(self.grid.shape, np.float32)
        share[box] = coverage(distance, self.grid.voxel_mm)
        return share.sum() * np.prod(self.grid.spacing) / 1000

    @pytest.mark.parametrize("radii", [(9, 9, 9), (14, 8, 11)])
    def test_ellipsoid_covers_its_volume(self, radii):
        # A centre on a voxel centre is where the distance formula divides zero by zero.
        centre = (0.75, 0.5, 0.4)
        expected = 4 / 3 * np.pi * np.prod(radii) / 1000
        assert self.volume_ml(Ellipsoid(centre=centre, radii=radii)) == pytest.approx(expected, rel=0.02)

    def test_turned_ellipsoid_covers_the_same_volume(self):
        turn = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]])
        turned = self.volume_ml(Ellipsoid(centre=(0, 0, 0), radii=(14, 8, 11), turn=turn))
        assert turned == pytest.approx(self.volume_ml(Ellipsoid(centre=(0, 0, 0), radii=(14, 8, 11))), rel=0.02)

    def test_tube_covers_a_capsule(self):
        shape = tube([(0.0, 0.0, -10.0), (0.0, 0.0, 0.0), (0.0, 0.0, 10.0)], 5.0)
        assert self.volume_ml(shape) == pytest.approx((np.pi * 25 * 20 + 4 / 3 * np.pi * 125) / 1000, rel=0.03)

    def test_structure_outside_the_grid_paints_nothing(self):
        noise = draw_noise(np.random.default_rng(0), self.grid)
        for shape in (
            tube([(0.0, 0.0, 500.0), (9.0, 0.0, 500.0)], 5.0),
            Ellipsoid(centre=(0, 0, 500), radii=(5, 5, 5)),
        ):
            image = np.zeros(self.grid.shape, np.float32)
            paint(image, self.grid, noise, Structure(shape=shape, hu=100.0), -100.0)
            assert not image.any()

    def test_noise_is_smooth_and_of_unit_variance(self):
        field = smooth_noise(np.random.default_rng(0), Grid(shape=(80, 80, 80), spacing=(1, 1, 1)), 6)
        assert field.dtype == np.float32
        assert abs(field.mean()) < 0.1
        assert field.std() == pytest.approx(1, abs=0.15)
        assert np.corrcoef(field[:, :, :-1].ravel(), field[:, :, 1:].ravel())[0, 1] > 0.9
        assert abs(np.corrcoef(field[:, :, :-15].ravel(), field[:, :, 15:].ravel())[0, 1]) < 0.1
