"""What several modules about paths of TorchScript use."""

import pytest
import torch

from tests.engine.export.scripted.paths import compiled
from tests.engine.factory import multi_task, plans_json, write_model


@pytest.fixture
def unoptimised():
    """Run compiled code as it is: torch takes most of a second to optimise it while it runs for the first times."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(scope="module")
def multi_task_path(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "m", plans=multi_task(plans_json()))
    return folder, compiled(folder)
