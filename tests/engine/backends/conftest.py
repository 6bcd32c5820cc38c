"""What several modules about TensorRT use."""

import pytest
from nnturbo.engine.backends.tensorrt_library import Library
from nnturbo.engine.model.folder import read_model

from tests.engine.backends.tensorrt_cases import Case
from tests.engine.factory import multi_task, plans_2d, plans_json, write_model


@pytest.fixture(scope="session")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    plans = multi_task(plans_json(), kind="attention")
    return Case(read_model(write_model(folder / "m", plans=plans)), folder, "fp16")


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return Case(read_model(write_model(folder / "m", plans=plans_2d())), folder, "fp32")


@pytest.fixture(scope="session")
def rtx():
    return Library("tensorrt_rtx")
