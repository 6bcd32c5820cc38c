"""Features of tiles around the lesion, from a network whose features are the voxels themselves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnturbo.benchmarks.class_crops import (
    AROUND,
    BOX,
    BOX_MM,
    SEVERAL,
    SHIFTS,
    TRUE_CENTRE,
    TRUE_OUTLINE,
    VIEWS,
    LesionTiles,
    columns,
)

PATCH = (8, 12, 16)
PLAN = SimpleNamespace(patch_size_3d=PATCH, spacing=(12.0, 8.0, 6.0))
SHAPE = (20, 30, 40)
SCAN = torch.from_numpy(np.random.default_rng(3).normal(size=(1, *SHAPE)).astype(np.float32))
LESION = (slice(9, 12), slice(14, 17), slice(20, 23))


def network():
    """A stand-in: one stage, the voxels; the lesion is wherever they are above 1."""

    def decoder(features):
        return torch.cat([torch.zeros_like(features[0]), -99 * torch.ones_like(features[0]), 99 * (features[0] - 1)], 1)

    scheme = SimpleNamespace(focus_channels=(2,), regions=False)
    return SimpleNamespace(encoder=lambda tiles: [tiles], decoder=decoder, scheme=scheme)


def case(scan=SCAN, **changes):
    shape = tuple(scan.shape[1:])
    whole = {"shape": shape, "full_shape": shape, "box": tuple((0, size) for size in shape)}
    return SimpleNamespace(**whole | {"transpose_forward": (0, 1, 2), "planes": lambda _: iter([scan])} | changes)


def labels(place, shape=SHAPE):
    found = np.zeros(shape, np.uint8)
    found[place] = 2
    return found


def tile(centre):
    return tuple(
        slice(start, start + patch)
        for start, patch in (
            (min(max(0, round(at - patch / 2)), size - patch), patch)
            for at, patch, size in zip(centre, PATCH, SHAPE, strict=True)
        )
    )


@pytest.fixture(scope="module")
def found():
    away = labels((slice(2, 5), slice(4, 7), slice(30, 33)))
    return LesionTiles(network(), PLAN, (0,)).features(case(), labels(LESION), away)


def mean(place):
    return float(SCAN[0][place].mean())


def test_the_tile_lies_around_the_predicted_lesion(found):
    assert found[AROUND][0] == pytest.approx(mean(tile((10.5, 15.5, 21.5))), abs=1e-6)
    voxels = SCAN[0][tile((10.5, 15.5, 21.5))]
    assert found[AROUND][1] == pytest.approx(float(voxels[voxels > 1].mean()), abs=0.02)


def test_the_box_has_a_size_in_millimetres(found):
    halves = [BOX_MM / side / 2 for side in PLAN.spacing]
    place = tuple(
        slice(round(at - half), round(at + half)) for at, half in zip((10.5, 15.5, 21.5), halves, strict=True)
    )
    assert SCAN[0][place].shape == (4, 6, 8)
    assert found[BOX][0] == pytest.approx(mean(place), abs=1e-6)
    assert found[BOX][1:] == pytest.approx(found[AROUND][1:])


def test_mirror_views_of_a_network_without_direction_are_the_same(found):
    assert found[VIEWS] == pytest.approx(found[AROUND], abs=1e-6)


def test_several_tiles_are_averaged(found):
    centres = [(10.5, 15.5, 21.5)]
    centres += [tuple(np.add(centres[0], np.multiply(shift, PATCH)).tolist()) for shift in SHIFTS]
    assert found[SEVERAL][0] == pytest.approx(np.mean([mean(tile(centre)) for centre in centres]), abs=1e-6)


def test_the_true_outline_replaces_the_predicted_one(found):
    place = tile((3.5, 5.5, 31.5))
    assert found[TRUE_CENTRE][0] == found[TRUE_OUTLINE][0] == pytest.approx(mean(place), abs=1e-6)
    assert found[TRUE_OUTLINE][1] == pytest.approx(mean((slice(2, 5), slice(4, 7), slice(30, 33))), abs=1e-3)
    assert found[TRUE_CENTRE][1] > 1  # of the voxels that the network takes for the lesion


def test_small_scans_are_padded_and_finer_labels_fit():
    scan = SCAN[:, :4]
    ours = labels((slice(0, 2), slice(28, 34), slice(20, 23)), (4, 60, 40))
    found = LesionTiles(network(), PLAN, (0,)).features(case(scan), ours, ours)
    place = (slice(0, 4), *tile((0, 15.5, 21.5))[1:])
    assert found[AROUND][0] == pytest.approx(float(scan[0][place].sum()) / np.prod(PATCH), abs=1e-6)


def test_without_a_lesion_the_pancreas_is_the_middle():
    tiles = LesionTiles(network(), PLAN, (0,))
    pancreas, lesion, nothing = labels(LESION) // 2, labels(LESION), np.zeros(SHAPE, np.uint8)
    around = {
        name: tiles.features(case(), ours, lesion)[AROUND][0]
        for name, ours in (("lesion", lesion), ("pancreas", pancreas), ("nothing", nothing))
    }
    assert around["pancreas"] == around["lesion"]
    assert around["nothing"] == pytest.approx(mean(tile((10, 15, 20))), abs=1e-6)


def test_a_crop_is_refused():
    with pytest.raises(ValueError, match="without a crop"):
        LesionTiles(network(), PLAN, (0,)).features(
            case(box=((1, 20), (0, 30), (0, 40))), labels(LESION), labels(LESION)
        )


def test_columns_stack_scans():
    assert columns([{"a": np.zeros(3)}, {"a": np.ones(3)}])["a"].tolist() == [[0, 0, 0], [1, 1, 1]]
