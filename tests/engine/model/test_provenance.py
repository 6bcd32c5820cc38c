"""What is written about the making of a prediction, and read again."""

import json
from dataclasses import replace

import pytest
from nnturbo.engine.model.agreement import Agreement
from nnturbo.engine.model.provenance import LabelSettings, Provenance, provenance_json, read_provenance

from tests.engine.factory import provenance

AGREEMENT = Agreement(scans=2, voxels=10, different=1, dice={"a": 0.5, "b": None}, same_class=None, what="scans")
EVERYTHING = provenance(
    classifier="lda",
    aggregation="mean",
    network="mine.Net",
    use_gaussian=False,
    agreement=AGREEMENT,
    plan_remarks=("odd",),
    folds=("0", "1"),
)
LEAST = provenance(checkpoint=None, folds=())


@pytest.mark.parametrize("of_one", [EVERYTHING, LEAST])
def test_it_comes_back_from_its_json(of_one):
    assert Provenance.from_json(json.loads(json.dumps(of_one.to_json()))) == of_one
    assert LabelSettings.from_json(json.loads(json.dumps(of_one.settings.to_json()))) == of_one.settings


@pytest.mark.parametrize("models", [(LEAST,), (EVERYTHING, LEAST)])
def test_one_model_and_several_come_back(models):
    assert read_provenance(json.loads(json.dumps(provenance_json(models)))) == models


@pytest.mark.parametrize("content", [{}, {"torch": "2"}, {**LEAST.to_json(), "unknown": 1}, {"models": [{}]}])
def test_anything_else_is_refused(content):
    with pytest.raises(TypeError):
        read_provenance(content)


def test_every_setting_that_decides_labels_counts():
    settings = provenance().settings
    others = {**dict.fromkeys(settings.to_json(), "another"), "tile_step_size": 0.25, "mirror_views": 1}
    for name, value in others.items():
        assert replace(settings, **{name: value}) != settings
    assert provenance(backend="openvino", device="cuda:0", folds=("1",)).settings == settings
