"""Outlines of lesions, and how well their looks tell the subtype."""

import numpy as np
import pytest
from nnturbo.training.phantoms.anatomy import draw_anatomy, draw_pancreas
from nnturbo.training.phantoms.lesions import TENDENCIES, TRAITS, draw_lesion, outline
from nnturbo.training.phantoms.phantom import generate_phantom
from nnturbo.training.phantoms.phantom_settings import SMALL_SETTINGS, draw_geometry, draw_subtype
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def lesion_features(phantom):
    """What a reader could measure inside a given outline: attenuation, texture, rim, margin, duct, place, size."""
    found = ndimage.find_objects((phantom.mask > 0).astype(int))[0]
    box = tuple(slice(max(0, part.start - 7), part.stop + 7) for part in found)
    image, mask, spacing = phantom.image[box].astype(np.float32), phantom.mask[box], np.array(phantom.spacing)
    lesion, gland = mask == 2, mask == 1
    inside = ndimage.distance_transform_edt(lesion, spacing)
    outside, nearest = ndimage.distance_transform_edt(~lesion, spacing, return_indices=True)
    depth = ndimage.distance_transform_edt(mask > 0, spacing)
    smooth = ndimage.gaussian_filter(image, 0.8 / spacing)
    core = image[inside >= min(4.0, 0.6 * inside.max())]
    normal = np.median(image[gland & (outside > 4)])
    contrast = np.median(core) - normal
    shell = smooth[lesion & (inside <= 2) & (depth > 1.5)]
    beside = smooth[gland & (outside <= 2) & (depth > 1.5)]
    # Where the lesion borders on fat, its margin shows as the way down to fat.
    fat = (mask == 0) & (outside > 4) & (outside < 7) & (smooth < -60)
    facing = np.zeros(mask.shape, bool)
    facing[tuple(axis[fat] for axis in nearest)] = True
    fading = image[(mask == 0) & (outside > 1) & (outside <= 3) & facing[tuple(nearest)]]
    duct = (smooth < min(normal - 35, 60)) & gland & (depth > 3.5) & (outside > 3)
    place = np.argwhere(lesion).mean(0)
    upstream = np.indices(mask.shape)[2] > place[2]
    return [
        core.mean(),
        contrast,
        core.std(),
        np.percentile(core, 10),
        np.percentile(core, 90),
        shell.mean() - core.mean() if shell.size else 0.0,
        (shell.mean() - normal) / (abs(contrast) + 20) if shell.size else 0.0,
        (beside.mean() - normal) / (abs(contrast) + 20) if beside.size else 0.0,
        (np.median(fading) + 95) / (np.median(core) + 95) if fading.size > 5 else 0.2,
        np.log1p((duct & upstream).sum() * np.prod(spacing)),
        np.log1p((duct & ~upstream).sum() * np.prod(spacing)),
        np.log(lesion.sum() * np.prod(spacing)),
        *(place / mask.shape),
    ]


def macro_f1(features, subtypes):
    """Cross-validated macro-F1 of a logistic regression."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return f1_score(subtypes, cross_val_predict(classifier, np.array(features), subtypes, cv=folds), average="macro")


def drawn_lesions(count, separation):
    """Lesions drawn without painting them."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        grid = draw_geometry(seed, SMALL_SETTINGS)
        anatomy = draw_anatomy(rng, grid)
        pancreas = draw_pancreas(rng, anatomy)
        yield (
            anatomy,
            pancreas,
            grid,
            draw_lesion(rng, grid, anatomy, pancreas, subtype=seed % 3, separation=separation),
        )


class TestOutline:
    def test_thin_lesion_keeps_a_label(self):
        gland = np.ones((3, 8, 8), np.float32)
        lesion = np.zeros_like(gland)
        lesion[1, 3:5, 3:5] = 0.3
        assert (outline(gland, lesion) == 2).sum() == 4

    def test_stray_pieces_lose_their_label(self):
        gland, lesion = np.zeros((2, 4, 9, 9), np.float32)
        gland[1:3, 1:5, 1:5] = 1
        gland[3, 8, 8] = 1
        lesion[1:3, 3:6, 3:6] = 1
        lesion[1, 1, 1] = 1
        mask = outline(gland, lesion)
        assert mask[3, 8, 8] == 0
        assert mask[1, 1, 1] == 1
        assert (mask == 2).sum() == 18


class TestSubtypes:
    def test_frequencies(self):
        counts = np.bincount([draw_subtype(seed) for seed in range(1500)], minlength=3)
        assert counts / 1500 == pytest.approx(np.array([62, 106, 84]) / 252, abs=0.04)

    def test_traits_overlap_as_stated(self):
        rng = np.random.default_rng(0)
        subtypes = rng.integers(0, 3, 3000)
        for separation, low, high in ((1.0, 0.93, 0.975), (0.0, 0.28, 0.38)):
            traits = rng.standard_normal((3000, len(TRAITS))) + separation * TENDENCIES[subtypes]
            assert low < macro_f1(traits, subtypes) < high

    def test_lesions_lean_to_their_subtype(self):
        drawn = [lesion for *_, lesion in drawn_lesions(600, 1.0)]
        mean = {
            name: [np.mean([getattr(lesion, name) for lesion in drawn if lesion.subtype == s]) for s in range(3)]
            for name in ("hu", "margin_mm", "rim_hu", "dilated_duct_mm", "arc")
        }
        assert mean["hu"][1] + 20 < mean["hu"][0] < mean["hu"][2] - 20
        assert mean["margin_mm"][0] > 1.5 * max(mean["margin_mm"][1:])
        assert mean["rim_hu"][2] > max(mean["rim_hu"][:2])
        assert mean["dilated_duct_mm"][0] > 1.5 * max(mean["dilated_duct_mm"][1:])
        assert mean["arc"][0] < min(mean["arc"][1:])

    def test_lesions_lie_in_the_gland_and_the_region(self):
        for _, pancreas, grid, lesion in drawn_lesions(300, 1.0):
            assert (abs(np.array(lesion.centre_mm)) + max(lesion.radii_mm) < np.array(grid.extent_mm) / 2).all()
            to_axis = np.sqrt(((pancreas.points - lesion.centre_mm) ** 2).sum(1)) - pancreas.radii
            assert to_axis.min() < min(lesion.radii_mm)
            assert 4.9 < 2 * np.cbrt(np.prod(lesion.radii_mm)) < 50.1

    @pytest.mark.thorough  # features of 24 lesions: ten seconds
    def test_the_outlined_lesion_shows_its_subtype(self, phantoms):
        score = macro_f1([lesion_features(phantom) for phantom in phantoms], [p.subtype for p in phantoms])
        assert score > 0.6

    @pytest.mark.slow  # 300 phantoms: two to four minutes
    def test_overlap(self):
        made = [generate_phantom(50_000 + seed, settings=SMALL_SETTINGS) for seed in range(300)]
        score = macro_f1([lesion_features(phantom) for phantom in made], [phantom.subtype for phantom in made])
        assert 0.85 < score < 0.95
