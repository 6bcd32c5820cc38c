import hashlib
import itertools
import logging
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine.errors import OutputError
from nnturbo.training.phantoms import phantom as module
from nnturbo.training.phantoms.anatomy import draw_anatomy, draw_pancreas
from nnturbo.training.phantoms.lesions import TENDENCIES, TRAITS, draw_lesion, outline
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
from nnturbo.training.phantoms.phantom import (
    DEFAULT_SETTINGS,
    PANCREAS_COUNTS,
    SMALL_SETTINGS,
    PhantomSettings,
    case_seed,
    draw_geometry,
    draw_subtype,
    generate_phantom,
    write_dataset,
)
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

COUNT = 24
COUNTS = {"train": 3, "validation": 1, "test": 2}
DIGEST = "60e97484ed48c4319afcbff9301b15aafb71d346ca51ddd78ed10125c21e3de8"


@pytest.fixture(scope="module")
def phantoms():
    return [generate_phantom(seed, subtype=seed % 3, settings=SMALL_SETTINGS) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    steps = []
    cases = write_dataset(
        folder,
        counts=COUNTS,
        seed=5,
        settings=SMALL_SETTINGS,
        answers=True,
        scaled_mask_share=0.5,
        progress=lambda *step: steps.append(step),
    )
    return folder, cases, steps


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digest(phantom):
    return hashlib.sha256(phantom.image.tobytes() + phantom.mask.tobytes()).hexdigest()


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


class TestPhantom:
    def test_same_seed_gives_the_same_arrays(self, phantoms):
        again = generate_phantom(4, subtype=1, settings=SMALL_SETTINGS)
        assert digest(again) == digest(phantoms[4])
        assert again.parameters == phantoms[4].parameters
        assert len({digest(phantom) for phantom in phantoms}) == COUNT

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
    def test_refuses_bad_settings(self, change, text):
        with pytest.raises(ValueError, match=text):
            PhantomSettings(**change)


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

    def test_the_outlined_lesion_shows_its_subtype(self, phantoms):
        score = macro_f1([lesion_features(phantom) for phantom in phantoms], [p.subtype for p in phantoms])
        assert score > 0.6

    @pytest.mark.slow  # 300 phantoms: two to four minutes
    def test_overlap(self):
        made = [generate_phantom(50_000 + seed, settings=SMALL_SETTINGS) for seed in range(300)]
        score = macro_f1([lesion_features(phantom) for phantom in made], [phantom.subtype for phantom in made])
        assert 0.85 < score < 0.95


class TestDataset:
    def test_folders_and_names(self, written):
        folder, cases, _ = written
        labelled = [
            f"{case.split}/subtype{case.subtype}/quiz_{case.subtype}_{number}{ending}"
            for case, number in zip(cases[:4], ("001", "004", "007", "002"), strict=True)
            for ending in (".nii.gz", "_0000.nii.gz")
        ]
        unlabelled = [f"test/quiz_{number}_0000.nii.gz" for number in ("003", "006")]
        answers = [f"test_answers/{name}" for name in ("quiz_003.nii.gz", "quiz_006.nii.gz", "subtype_results.csv")]
        assert files_in(folder) == sorted([*labelled, *unlabelled, *answers])

    def test_files_hold_the_phantoms(self, written):
        _, cases, _ = written
        origins = set()
        for case in cases:
            phantom = generate_phantom(case.seed, subtype=case.subtype, settings=SMALL_SETTINGS)
            image, mask = sitk.ReadImage(str(case.image)), sitk.ReadImage(str(case.mask))
            assert np.array_equal(sitk.GetArrayFromImage(image), phantom.image)
            assert np.array_equal(np.rint(sitk.GetArrayFromImage(mask)), phantom.mask)
            assert image.GetSpacing() == pytest.approx(phantom.spacing[::-1], rel=1e-6)
            assert image.GetOrigin() == mask.GetOrigin()
            assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
            origins.add(image.GetOrigin())
        assert len(origins) == len(cases)

    def test_some_masks_are_scaled(self, written):
        _, cases, _ = written
        values = {
            case.image.name: [f"{value:.7f}" for value in np.unique(sitk.GetArrayFromImage(sitk.ReadImage(case.mask)))]
            for case in cases
        }
        scaled = [case for case in cases if values[case.image.name] == ["0.0000000", "1.0000153", "2.0000305"]]
        whole = [case for case in cases if values[case.image.name] == ["0.0000000", "1.0000000", "2.0000000"]]
        assert len(scaled) + len(whole) == len(cases)
        assert 0 < len(scaled) < 4
        assert all(case.split != "test" for case in scaled)
        assert all(sitk.ReadImage(case.mask).GetPixelID() == sitk.sitkFloat64 for case in scaled)

    def test_answers(self, written):
        folder, cases, _ = written
        rows = (folder / "test_answers/subtype_results.csv").read_text().splitlines()
        expected = [f"quiz_{n}.nii.gz,{c.subtype}" for n, c in zip(("003", "006"), cases[4:], strict=True)]
        assert rows == ["Names,Subtype", *expected]

    def test_progress(self, written):
        _, cases, steps = written
        assert steps == [(done, len(cases), case.image) for done, case in enumerate(cases, start=1)]

    def test_larger_set_contains_the_smaller(self, written, tmp_path):
        _, cases, _ = written
        few = list(module._plan(tmp_path, COUNTS, 5, SMALL_SETTINGS, False))
        many = list(module._plan(tmp_path, PANCREAS_COUNTS, 5, SMALL_SETTINGS, False))
        assert set(few) <= set(many)
        assert [case.seed for case in few] == [case.seed for case in cases]
        assert few[-1].mask is None

    def test_full_set_has_the_real_set_s_counts(self, tmp_path):
        cases = list(module._plan(tmp_path, PANCREAS_COUNTS, 0, DEFAULT_SETTINGS, True))
        counts = {
            split: [sum(case.split == split and case.subtype == s for case in cases) for s in range(3)]
            for split in PANCREAS_COUNTS
        }
        assert counts["train"] == [62, 106, 84]
        assert counts["validation"] == [9, 15, 12]
        assert sum(counts["test"]) == 72
        assert len({case.seed for case in cases}) == len({case.image.name for case in cases}) == 360

    def test_any_first_cases_are_balanced(self):
        given = list(module._balanced_subtypes(252, DEFAULT_SETTINGS))
        for count, subtype in itertools.product(range(1, 253), range(3)):
            expected = count * (62, 106, 84)[subtype] / 252
            assert abs(given[:count].count(subtype) - expected) < 1.01

    def test_case_seed_depends_on_each_argument(self):
        seeds = [case_seed(*key) for key in itertools.product((0, 1), ("train", "test"), range(20))]
        assert len(set(seeds)) == len(seeds)

    def test_existing_files_stay(self, tmp_path):
        arguments = {"counts": {"train": 1}, "settings": SMALL_SETTINGS, "scaled_mask_share": 0}
        (case,) = write_dataset(tmp_path, **arguments)
        case.image.unlink()
        case.mask.write_bytes(b"mine")
        with pytest.raises(OutputError, match="1 of 2 files exist"):
            write_dataset(tmp_path, **arguments)
        assert case.mask.read_bytes() == b"mine"
        assert not case.image.exists()
        write_dataset(tmp_path, **arguments, overwrite=True)
        assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(case.mask)))) == {0, 1, 2}
        assert case.image.exists()

    def test_two_sets_are_not_mixed(self, tmp_path):
        arguments = {"settings": SMALL_SETTINGS, "overwrite": True}
        write_dataset(tmp_path, counts={"train": 2}, **arguments)
        before = files_in(tmp_path)
        with pytest.raises(OutputError, match=r"2 other files lie in the folders, the first is .*quiz_._004"):
            write_dataset(tmp_path, counts={"train": 1}, seed=1, **arguments)
        assert files_in(tmp_path) == before
        write_dataset(tmp_path, counts={"validation": 1}, **arguments)
        assert len(files_in(tmp_path)) == len(before) + 2

    @pytest.mark.parametrize("error", [RuntimeError("disk gone"), KeyboardInterrupt()])
    def test_interruption_leaves_whole_files_only(self, tmp_path, monkeypatch, error):
        write = sitk.WriteImage
        written = []

        def fail_at_third(image, name, *rest):
            if len(written) == 2:
                with open(name, "wb") as file:
                    file.write(b"half")
                raise error
            write(image, name, *rest)
            written.append(name)

        monkeypatch.setattr(module.sitk, "WriteImage", fail_at_third)
        with pytest.raises(OutputError if isinstance(error, RuntimeError) else KeyboardInterrupt):
            write_dataset(tmp_path, counts={"train": 2}, settings=SMALL_SETTINGS)
        left = files_in(tmp_path)
        assert len(left) == 2
        assert all("quiz_" in name and sitk.ReadImage(str(tmp_path / name)).GetSize() for name in left)

    def test_full_disk_is_noticed_first(self, tmp_path, monkeypatch):
        usage = module.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        with pytest.raises(OutputError, match=r"5 phantoms need about \d+ MB, .* has 1 MB free"):
            write_dataset(tmp_path / "new", counts={"train": 5}, settings=SMALL_SETTINGS)
        assert not (tmp_path / "new").exists()

    def test_room_asked_for_suffices(self, written):
        folder, cases, _ = written
        voxels = sum(np.prod(draw_geometry(case.seed, SMALL_SETTINGS).shape) for case in cases)
        used = sum((folder / name).stat().st_size for name in files_in(folder))
        assert 0.6 < used / (voxels * module.BYTES_PER_VOXEL) < 1

    def test_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be made"):
            write_dataset(tmp_path / "file", counts={"train": 1}, settings=SMALL_SETTINGS)

    def test_processes_write_the_same(self, written, tmp_path):
        folder, cases, _ = written
        steps = []
        arguments = {"counts": COUNTS, "seed": 5, "settings": SMALL_SETTINGS, "scaled_mask_share": 0.5}
        write_dataset(tmp_path, **arguments, workers=2, progress=lambda *step: steps.append(step))
        assert [step[0] for step in steps] == list(range(1, len(cases) + 1))
        for name in files_in(tmp_path):
            assert np.array_equal(*(sitk.GetArrayFromImage(sitk.ReadImage(top / name)) for top in (tmp_path, folder)))

    def test_failure_in_a_process_is_raised(self, tmp_path):
        counts = {"train": 2}
        first, _ = module._plan(tmp_path, counts, 0, SMALL_SETTINGS, False)
        first.image.mkdir(parents=True)
        with pytest.raises(OutputError, match=r"quiz_._001_0000\.nii\.gz cannot be written"):
            write_dataset(tmp_path, counts=counts, settings=SMALL_SETTINGS, workers=2, overwrite=True)

    def test_logs_and_prints_nothing(self, tmp_path, caplog, capsys):
        with caplog.at_level(logging.DEBUG, logger=module.logger.name):
            write_dataset(tmp_path, counts={"test": 1}, settings=SMALL_SETTINGS)
        assert caplog.messages[0] == f"Writing 1 phantoms to {tmp_path}"
        assert caplog.messages[1].startswith("1 of 1: ")
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"counts": {"training": 1}}, "counts must name splits"),
            ({"counts": {"train": -1}}, "counts must be non-negative"),
            ({"counts": {"train": 0}}, "positive sum"),
            ({"counts": {"train": 1.5}}, "counts must be non-negative integers"),
            ({"scaled_mask_share": 1.5}, "scaled_mask_share must lie in 0 to 1"),
            ({"workers": 0}, "workers must be at least 1"),
            ({"seed": -1}, "seed must be a non-negative integer"),
        ],
    )
    def test_refuses_bad_arguments(self, tmp_path, change, text):
        with pytest.raises(ValueError, match=text):
            write_dataset(tmp_path, **({"counts": {"train": 1}} | change))


def test_exports_exist():
    assert all(hasattr(module, name) for name in module.__all__)


def test_starts_without_torch():
    program = "import sys, nnturbo.training.phantoms.phantom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
