"""The path around the network as data, in bundles of the native backend."""

import json

import pytest
from nnturbo.engine.errors import ModelError
from nnturbo.engine.export.native_path import NATIVE_PATH_FILE, describe_path, write_native_path
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.plans import parse_plan

from tests.engine.factory import dataset_json, multi_task, plans_2d, plans_json, write_model


def plan_of(plans, **dataset):
    return parse_plan(plans, dataset_json(**dataset), "3d_fullres")


def test_a_plan_as_data(tmp_path):
    write_native_path(plan_of(multi_task(plans_json())), (0, 2), tmp_path)
    written = json.loads((tmp_path / NATIVE_PATH_FILE).read_text())
    assert written["patch_size"] == [8, 12, 16]
    assert written["views"] == [[], [0], [2], [0, 2]]
    assert written["channels"] == [
        {"scheme": "CTNormalization", "use_mask": False, "low": -150.0, "high": 250.0, "mean": 50.0, "std": 60.0}
    ]
    assert written["labels"]["names"] == [{"name": "pancreas", "values": [1]}, {"name": "lesion", "values": [2]}]
    assert written["classification"] == {"class_names": ["0", "1", "2"], "focus_channels": [2]}


def test_slices_and_what_json_lacks():
    infinite = {"order": 3, "separate_z_anisotropy_threshold": float("inf")}
    plans = plans_2d()
    plans["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"] = infinite
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["ZScoreNormalization"]
    described = describe_path(plan_of(plans), (0, 1))
    assert described.views == ((), (1,), (2,), (1, 2))
    assert described.resampling_data.threshold is None
    assert (described.channels[0].low, described.classification) == (None, None)


def test_many_labels_and_regions():
    labels = {"background": 0, **{f"label {value}": value for value in range(1, 300)}}
    assert describe_path(plan_of(plans_json(), labels=labels), ()).labels.bits == 16
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    described = describe_path(plan_of(plans_json(), **regions), ()).labels
    assert (described.bits, described.num_outputs, described.regions_class_order) == (8, 2, (1, 2))
    assert [label.values for label in described.names] == [(1, 2), (2,)]


CASCADE, TURNED = plans_json(previous_stage="3d_lowres"), plans_json()
TURNED["image_reader_writer"] = "SimpleITKIOWithReorient"


@pytest.mark.parametrize(
    ("plans", "message"),
    [(CASCADE, "continues from the labels of 3d_lowres"), (TURNED, "trained on reoriented scans")],
)
def test_models_that_need_more_than_a_scan_are_refused(plans, message):
    with pytest.raises(ModelError, match=message):
        describe_path(plan_of(plans), ())


def test_a_bundle_without_the_path_is_said(tmp_path, caplog):
    model = read_model(write_model(tmp_path / "m", plans=TURNED))
    write_native_path(model.plan, model.mirror_axes, tmp_path)
    assert "the C library cannot use this bundle: the C library takes a scan without its orientation" in caplog.text
    assert not (tmp_path / NATIVE_PATH_FILE).exists()
