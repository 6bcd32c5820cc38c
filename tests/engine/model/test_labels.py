"""Labels of dataset.json: what is wrong with them, and the values that are written for them."""

import logging

import numpy as np
import pytest
from nnturbo.engine import ModelError
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.labels import parse_labels

from tests.engine.factory import dataset_json, write_model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"pancreas": 1}}, "'background': 0"),
        ({"labels": {"background": 1}}, "'background': 0"),
        ({"labels": {"background": 0, "a": "one"}}, "'a' must be an integer"),
        ({"labels": {"background": 0, "a": "1.0"}}, "'a' must be an integer"),
        ({"labels": {"background": 0, "a": 1.5}}, "'a' must be an integer"),
        ({"labels": {"background": 0, "a": float("inf")}}, "'a' must be an integer"),
        ({"labels": {"background": 0, "a": []}}, "'a' must be an integer"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "a name of their own each"),
        (
            {"labels": {"background": 0, "a": 1, "ignore": "2"}},
            "'ignore' must be the integer .* other label, 2, got '2'",
        ),
        ({"labels": {"background": 0, "a": 1, "ignore": 3}}, "other label, 2, got 3"),
        ({"labels": {"background": "0", "a": [1, 2]}, "regions_class_order": [1]}, "must be the number 0, got '0'"),
        (
            {"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": [1.5]},
            "regions_class_order must be integers",
        ),
        ({"labels": {"background": 0, "a": [1, 2]}}, "must have 'regions_class_order'"),
        ({"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": [1, 2]}, "one label per region"),
        (
            {"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": [300]},
            r"must hold values up to 255, which nnU-Net writes with so few labels, got \[300\]",
        ),
        ({"labels": 3}, "'labels' must be a dict"),
    ],
)
def test_what_is_wrong_with_labels_is_named(change, message):
    with pytest.raises(ModelError, match=message):
        parse_labels({**dataset_json(), **change})


def test_labels_regions_and_ignore():
    scheme = parse_labels(
        {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    )
    assert (scheme.num_outputs, scheme.foreground, scheme.regions_class_order) == (2, (1, 2), (1, 2))
    many = parse_labels({"labels": {"background": 0, **{str(i): i for i in range(1, 256)}}})
    assert (many.num_outputs, many.dtype) == (256, np.uint16)


NESTED = {"background": 0, "none": [0, 0], "whole": [1, 2, 3], "core": [2, 3], "active": 3}


@pytest.mark.parametrize(
    ("labels", "order", "written", "renumbered"),
    [
        ({"background": 0, "a": 1, "b": 2}, None, {"a": (1,), "b": (2,)}, ()),
        ({"background": 0, "a": 3, "b": 7}, None, {"a": (1,), "b": (2,)}, ("a", "b")),
        ({"b": 7, "a": 1, "background": 0}, None, {"b": (2,), "a": (1,)}, ("b",)),
        ({"background": 0, "a": 1, "the same": 1, "b": 2}, None, {"a": (1,), "the same": (1,), "b": (2,)}, ()),
        (NESTED, [1, 2, 3], {"whole": (1, 2, 3), "core": (2, 3), "active": (3,)}, ()),
        (NESTED, [2, 3, 1], {"whole": (1, 2, 3), "core": (1, 3), "active": (1,)}, ("core", "active")),
        (NESTED, [4, 5, 6], {"whole": (4, 5, 6), "core": (5, 6), "active": (6,)}, ("whole", "core", "active")),
        (NESTED, [1, 1, 3], {"whole": (1, 3), "core": (1, 3), "active": (3,)}, ("core",)),
        (NESTED, [1, 0, 3], {"whole": (1, 3), "core": (3,), "active": (3,)}, ()),
        ({"background": 0, "left": [1, 2], "right": [2, 3]}, [1, 3], {"left": (1,), "right": (3,)}, ()),
    ],
)
def test_labels_have_the_values_that_nnunet_writes(tmp_path, caplog, labels, order, written, renumbered):
    dataset = dataset_json(labels=labels, **({} if order is None else {"regions_class_order": order}))
    scheme = parse_labels(dataset)
    assert scheme.written == written
    assert tuple(scheme.renumbered) == renumbered
    with caplog.at_level(logging.WARNING):
        read_model(write_model(tmp_path / "m", dataset=dataset))
    (*told,) = (message for message in caplog.messages if "other values than dataset.json's" in message)
    assert len(told) == bool(renumbered)
    for name in renumbered:
        assert f"{name} as {' or '.join(map(str, written[name]))}" in told[0]
