"""What most tests of jobs begin with."""

import pytest
from nnturbo.engine import Engine

from tests.engine.factory import write_model, write_scan


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine.load(write_model(tmp_path_factory.mktemp("model") / "m"), device="cpu", mirror=False)


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for index, name in enumerate("abc"):
        write_scan(folder / f"{name}_0000.nii.gz", index)
    return folder
