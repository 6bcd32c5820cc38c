"""One phantom from one seed: the arrays, their labels and attenuations."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from nnturbo.training.phantoms import phantom as module
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, PhantomSettings, generate_phantom
from scipy import ndimage

DIGEST = "60e97484ed48c4319afcbff9301b15aafb71d346ca51ddd78ed10125c21e3de8"


def digest(phantom):
    return hashlib.sha256(phantom.image.tobytes() + phantom.mask.tobytes()).hexdigest()


class TestPhantom:
    def test_same_seed_gives_the_same_arrays(self, phantoms):
        again = generate_phantom(4, subtype=1, settings=SMALL_SETTINGS)
        assert digest(again) == digest(phantoms[4])
        assert again.parameters == phantoms[4].parameters
        assert len({digest(phantom) for phantom in phantoms}) == len(phantoms)

    def test_arrays_are_those_of_every_machine(self):
        # Changes with the generator on purpose only: data sets made from seeds then differ from earlier ones.
        assert digest(generate_phantom(7, settings=SMALL_SETTINGS)) == DIGEST

    def test_subtype_leaves_patient_and_geometry(self, phantoms):
        other = generate_phantom(4, subtype=2, settings=SMALL_SETTINGS)
        assert other.parameters.anatomy == phantoms[4].parameters.anatomy
        assert other.spacing == phantoms[4].spacing
        assert other.parameters.lesion != phantoms[4].parameters.lesion

    def test_types_and_labels(self, phantoms):
        for seed, phantom in enumerate(phantoms):
            assert phantom.image.dtype == np.int16
            assert phantom.mask.dtype == np.uint8
            assert phantom.image.shape == phantom.mask.shape
            assert set(np.unique(phantom.mask)) == {0, 1, 2}
            assert (phantom.seed, phantom.subtype) == (seed, seed % 3)
            assert phantom.parameters.lesion.subtype == phantom.subtype

    def test_one_lesion_touches_the_pancreas(self, phantoms):
        for phantom in phantoms:
            assert ndimage.label(phantom.mask == 2)[1] == 1
            assert ndimage.label(phantom.mask > 0)[1] == 1
            assert (ndimage.binary_dilation(phantom.mask == 2) & (phantom.mask == 1)).any()

    @pytest.mark.parametrize("slice_mm", [0.45, 8.0])
    def test_thinnest_and_thickest_slices(self, slice_mm):
        settings = PhantomSettings(
            slice_spacings_mm=((slice_mm, 1),),
            other_weight=0,
            in_plane_mm=(0.97, 0.97, 0.97),
            smallest_shape=(10, 48, 80),
            largest_shape=(280, 80, 110),
        )
        phantom = generate_phantom(1, settings=settings)
        assert phantom.spacing[0] == slice_mm
        assert set(np.unique(phantom.mask)) == {0, 1, 2}

    def test_attenuations_are_those_of_the_fingerprint(self, phantoms):
        rng = np.random.default_rng(0)
        foreground = np.concatenate([rng.choice(p.image[p.mask > 0], 1000) for p in phantoms])
        assert foreground.mean() == pytest.approx(74, abs=10)
        assert foreground.std() == pytest.approx(44, abs=8)
        assert -110 < np.percentile(foreground, 0.5) < -30
        assert 150 < np.percentile(foreground, 99.5) < 210

    def test_organs_have_their_attenuation(self, phantoms):
        for phantom in phantoms:
            fat = phantom.image[(phantom.image > -160) & (phantom.image < -40)]
            assert fat.size > 0.2 * phantom.image.size
            assert np.median(fat) == pytest.approx(-100, abs=20)
            # Vessels, kidneys and bone.
            assert np.mean(phantom.image > 130) > 0.01
            assert np.mean(phantom.image > 200) > 0.001
            assert phantom.image.min() >= -1024

    def test_volumes_are_those_of_the_pancreas_data_set(self, phantoms):
        of_voxels = [np.mean(phantom.mask == 2) for phantom in phantoms]
        of_foreground = [np.sum(phantom.mask == 2) / np.sum(phantom.mask > 0) for phantom in phantoms]
        assert np.mean(of_voxels) == pytest.approx(0.015, abs=0.006)
        assert np.mean(of_foreground) == pytest.approx(0.23, abs=0.07)
        assert min(of_foreground) < 0.1
        assert max(of_foreground) > 0.4

    def test_noise_is_as_drawn(self):
        settings = {"slice_spacings_mm": ((2.5, 1),), "other_weight": 0, "in_plane_mm": (1.0, 1.0, 1.0)}
        settings |= {"smallest_shape": (20, 60, 80), "largest_shape": (30, 70, 90)}
        noisy, clean = (
            generate_phantom(3, settings=PhantomSettings(**settings, noise_hu=(level, level))) for level in (20.0, 0.0)
        )
        difference = noisy.image.astype(float) - clean.image
        inside = clean.image > -900
        assert difference[inside].std() == pytest.approx(20, abs=0.5)

    @pytest.mark.parametrize("seed", [-1, 1.5, True, "1", None])
    def test_refuses_a_bad_seed(self, seed):
        with pytest.raises(ValueError, match="seed must be a non-negative integer"):
            generate_phantom(seed)

    @pytest.mark.parametrize("subtype", [3, -1, "1"])
    def test_refuses_a_bad_subtype(self, subtype):
        with pytest.raises(ValueError, match="subtype must be 0, 1, 2 or None"):
            generate_phantom(0, subtype=subtype)


def test_exports_exist():
    assert all(hasattr(module, name) for name in module.__all__)


def test_starts_without_torch():
    program = "import sys, nnturbo.training.phantoms.phantom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
