"""A model to hand on: the same answers, nothing of the training."""

import numpy as np
import pytest
import torch
from nnturbo.engine import Engine, ModelError, OutputError
from nnturbo.training.publish import publish_model


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    return publish_model(trained, tmp_path_factory.mktemp("published") / "model")


def test_answers_are_the_same(published, trained, tiny):
    scan = tiny.image(tiny.validation_cases[0])
    ours, theirs = (Engine.load(path, mirror=False, device="cpu").predict(scan) for path in (published, trained))
    np.testing.assert_array_equal(ours.segmentation, theirs.segmentation)
    assert ours.classification == theirs.classification


def test_only_what_inference_needs_is_kept(published, trained):
    after, before = (path / "fold_0" / "checkpoint_final.pth" for path in (published, trained))
    content = torch.load(after, weights_only=True)
    assert set(content) == {"network_weights", "trainer_name", "inference_allowed_mirroring_axes", "init_args"}
    assert content["init_args"] == {"configuration": "3d_fullres"}
    assert after.stat().st_size < before.stat().st_size / 2
    assert str(trained.parents[1]).encode() not in after.read_bytes()
    assert sorted(path.name for path in published.iterdir()) == ["dataset.json", "fold_0", "plans.json"]
    for name in ("history.csv", "curves.png"):
        assert (published / "fold_0" / name).read_bytes() == (trained / "fold_0" / name).read_bytes()


def test_nothing_is_replaced(published, trained):
    with pytest.raises(OutputError, match="exists: choose another folder"):
        publish_model(trained, published)


def test_no_model(tmp_path):
    with pytest.raises(ModelError):
        publish_model(tmp_path / "none", tmp_path / "target")
    assert not (tmp_path / "target").exists()
