"""What is wrong with plans.json and dataset.json is named, and any change gives a model or one clear error."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnturbo.engine import ModelError
from nnturbo.engine.model.network import make_network
from nnturbo.engine.model.plans import parse_plan

from tests.engine.factory import dataset_json, plans_json
from tests.engine.model.changed_json import CONFIGURATION, changed, places, values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("configurations",), ..., "plans.json must have 'configurations'"),
        (CONFIGURATION, ..., "must have the configuration '3d_fullres'"),
        ((*CONFIGURATION, "patch_size"), ..., "must have 'patch_size'"),
        ((*CONFIGURATION, "patch_size"), [8, 0, 8], "positive integers"),
        ((*CONFIGURATION, "patch_size"), [8, 8.5, 8], "positive integers"),
        ((*CONFIGURATION, "patch_size"), [8], "2 or 3 entries"),
        ((*CONFIGURATION, "patch_size"), [100000, 100000, 100000], "at most 2\\^31 voxels"),
        ((*CONFIGURATION, "spacing"), [1, 1], "2 or 3 entries"),
        ((*CONFIGURATION, "spacing"), [1, -1, 1], "positive numbers"),
        ((*CONFIGURATION, "normalization_schemes"), ["Fancy"], "normalization must be one of"),
        ((*CONFIGURATION, "normalization_schemes"), [], "for each of the 1 channels"),
        ((*CONFIGURATION, "use_mask_for_norm"), [], "for each of the 1 channels"),
        ((*CONFIGURATION, "resampling_fn_data"), "magic", "resampling function must be one of"),
        ((*CONFIGURATION, "inherits_from"), "3d_fullres", "in a circle: 3d_fullres -> 3d_fullres"),
        ((*CONFIGURATION, "architecture"), [], "'architecture' must be a dict"),
        ((*CONFIGURATION, "architecture"), ..., "must have 'UNet_class_name'"),
        ((*CONFIGURATION, "spacing"), [10**400, 1, 1], "positive numbers"),
        ((*CONFIGURATION, "use_mask_for_norm"), ["false"], "must hold true or false"),
        ((*CONFIGURATION, "preprocessor_name"), "MyPreprocessor", "trained with 'MyPreprocessor'"),
        (("label_manager",), "MyLabelManager", "trained with 'MyLabelManager'"),
        (("foreground_intensity_properties_per_channel", "0", "mean"), 10**400, "must be finite"),
        (("transpose_forward",), [0, 1, 1], "order of the axes"),
        (("transpose_forward",), "012", "must be a list"),
        (("image_reader_writer",), "MyReader", "trained with 'MyReader'"),
        (("foreground_intensity_properties_per_channel",), {}, "must have '0'"),
        (("foreground_intensity_properties_per_channel", "0", "std"), float("nan"), "must be finite"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(path, value, message):
    with pytest.raises(ModelError, match=message):
        parse_plan(changed(plans_json(), path, value), dataset_json(), "3d_fullres")


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(places(plans_json()))), values | st.just(...))
def test_any_change_to_a_plan_gives_a_network_or_a_clear_error(path, value):
    try:
        plan = parse_plan(changed(plans_json(), path, value), dataset_json(), "3d_fullres")
        make_network(plan.architecture, plan.input_channels, plan.labels.num_outputs)
    except ModelError as error:
        assert "\n" not in str(error)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(list(places(dataset_json()))), values | st.just(...))
def test_any_change_to_a_dataset_gives_a_plan_or_a_clear_error(path, value):
    try:
        parse_plan(plans_json(), changed(dataset_json(), path, value), "3d_fullres")
    except ModelError as error:
        assert "\n" not in str(error)
