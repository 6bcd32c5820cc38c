"""What is asked of nnU-Net's planners reaches them, and plans of one's own replace nothing."""

import json
import math
import warnings

import pytest
from nnturbo.engine import EngineError
from nnturbo.training.data.planners import Planning, described_network, plan_experiment

from tests.training.task_files import CASES, image_of, labels, mask_of, prepare, scan, write_image


@pytest.fixture(scope="module")
def fingerprinted(tmp_path_factory, nnunet):
    """A data set with a fingerprint; the folder `nnUNet_preprocessed` and the name."""
    from nnturbo.training.data.planning import nnunet_environment

    folder = tmp_path_factory.mktemp("planners")
    shape = (40, 90, 100)
    for seed, name in enumerate(CASES):
        write_image(image_of(folder / "source", name), scan(seed, shape), spacing=(0.8, 0.8, 2.5))
        write_image(mask_of(folder / "source", name), labels(shape), spacing=(0.8, 0.8, 2.5))
    dataset = prepare(folder / "source", folder / "raw")
    target = folder / "pre" / dataset.folder.name
    target.mkdir(parents=True)
    number = {"mean": 70.0, "std": 40.0, "median": 70.0, "min": -100, "max": 200, "percentile_00_5": -56}
    (target / "dataset_fingerprint.json").write_text(
        json.dumps(
            {
                "spacings": [[2.5, 0.8, 0.8]] * 2,
                "shapes_after_crop": [list(shape)] * 2,
                "median_relative_size_after_cropping": 1.0,
                "foreground_intensity_properties_per_channel": {"0": {**number, "percentile_99_5": 180}},
            }
        )
    )
    with nnunet_environment(raw=folder / "raw", preprocessed=folder / "pre", results=folder / "results"):
        yield folder / "pre", dataset.folder.name


def planned(fingerprinted, **asked):
    preprocessed, name = fingerprinted
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        path = plan_experiment(name, preprocessed, Planning(**asked), 2)
    return path, json.loads(path.read_text())["configurations"]["3d_fullres"]


def test_a_planner_that_an_older_nnunet_lacks(fingerprinted, monkeypatch):
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners

    monkeypatch.delattr(residual_encoder_unet_planners, "nnUNetPlannerResEncXL")
    with pytest.raises(
        EngineError, match="planner resenc_xl needs nnU-Net's nnUNetPlannerResEncXL, which this version"
    ):
        planned(fingerprinted, planner="resenc_xl")
    assert planned(fingerprinted, planner="plain")[0].name == "nnUNetPlans.json"


@pytest.mark.parametrize(
    ("planner", "plans", "network"),
    [
        ("resenc", "nnUNetResEncUNetMPlans", "ResidualEncoderUNet"),
        pytest.param("resenc_l", "nnUNetResEncUNetLPlans", "ResidualEncoderUNet", marks=pytest.mark.thorough),
        pytest.param("resenc_xl", "nnUNetResEncUNetXLPlans", "ResidualEncoderUNet", marks=pytest.mark.thorough),
        ("plain", "nnUNetPlans", "PlainConvUNet"),
        ("compact", "nnUNetCompactPlans", "PlainConvUNet"),
    ],
)
def test_each_planner_is_nnunets(fingerprinted, planner, plans, network):
    path, configuration = planned(fingerprinted, planner=planner)
    assert path.stem == plans
    assert configuration["architecture"]["network_class_name"].endswith(network)
    shared = "nnUNetPlans" if planner.startswith("resenc") else plans
    assert configuration["data_identifier"] == f"{shared}_3d_fullres"


def test_spacing_and_memory_reach_the_planner_and_have_names_of_their_own(fingerprinted):
    first, usual = planned(fingerprinted, planner="resenc")
    before = first.read_bytes()
    path, asked = planned(fingerprinted, planner="resenc", spacing=(3.0, 1.5, 1.5), memory_gb=2.0)
    assert path.stem == "nnUNetResEncUNetMPlans_2GB_3x1.5x1.5mm"
    assert asked["spacing"] == [3.0, 1.5, 1.5]
    assert asked["data_identifier"] == f"{path.stem}_3d_fullres"  # nnU-Net would write into that of nnUNetPlans
    assert first.read_bytes() == before
    assert usual["spacing"] == [2.5, 0.8, 0.8]
    said = f"3d_fullres: patches of {' x '.join(map(str, asked['patch_size']))} voxels, {asked['batch_size']} a batch"
    assert described_network(path, ["3d_fullres"]) == f"{said}, spacing 3 x 1.5 x 1.5 mm"


@pytest.mark.thorough
def test_less_memory_gives_smaller_patches(fingerprinted):
    sizes = []
    for memory_gb in (1.0, 4.0):
        _, configuration = planned(fingerprinted, planner="plain", memory_gb=memory_gb)
        sizes.append(configuration["batch_size"] * math.prod(configuration["patch_size"]))
    assert sizes[0] < sizes[1]


def test_the_compact_planner_takes_a_spacing_as_it_is(fingerprinted):
    _, usual = planned(fingerprinted, planner="compact")
    _, asked = planned(fingerprinted, planner="compact", spacing=(3.0, 1.5, 1.5))
    assert usual["spacing"] == pytest.approx([2.5, 1.2, 1.2])
    assert asked["spacing"] == [3.0, 1.5, 1.5]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"planner": "best"}, "planner must be one of resenc, resenc_l, resenc_xl, plain, compact, got 'best'"),
        ({"spacing": (1.0, 1.0)}, r"spacing must be three positive numbers of mm, \(z, y, x\), got \[1.0, 1.0\]"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing must be three positive numbers"),
        ({"memory_gb": 0.0}, "memory must be a positive number of GB, got 0.0"),
        ({"planner": "compact", "memory_gb": 8.0}, "planner compact has a fixed network, so memory must be left out"),
    ],
)
def test_what_cannot_be_planned(asked, message):
    with pytest.raises(ValueError, match=message):
        Planning(**asked)
