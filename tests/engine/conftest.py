"""What tests of several wings begin with."""

import pytest
from nnturbo.engine import Engine, Volume, build

from tests.engine.factory import multi_task, plans_json, pooled_classifier, smooth_scan, write_model, write_scans


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model folder of one fold; modules about other kinds of models have their own."""
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="session")
def engine(model):
    return Engine.load(model, device="cpu", mirror=False)


@pytest.fixture
def scans(tmp_path):
    return write_scans(tmp_path / "scans", "abc")


@pytest.fixture(scope="session")
def multi_task_model(tmp_path_factory):
    """Two folds with a head, and a classifier that was fitted afterwards."""
    return write_model(
        tmp_path_factory.mktemp("model") / "m",
        plans=multi_task(plans_json()),
        folds=("0", "1"),
        checkpoint={"pooled_classifier": pooled_classifier()},
    )


@pytest.fixture(scope="session")
def several_tiles():
    """A scan of several tiles."""
    return Volume.from_array(smooth_scan((9, 24, 26)), (3.0, 1.2, 1.2), name="scan")


@pytest.fixture(scope="session")
def one_tile():
    """A scan of one tile: bfloat16 takes long on CPUs that do not have it."""
    return Volume.from_array(smooth_scan((8, 12, 16)), (2.0, 1.5, 1.5), name="small scan")


@pytest.fixture(scope="session")
def built_bundle(multi_task_model, tmp_path_factory):
    """One bundle for all tests that only read."""
    return build(multi_task_model, tmp_path_factory.mktemp("bundles") / "b", backend="torchscript", device="cpu")
