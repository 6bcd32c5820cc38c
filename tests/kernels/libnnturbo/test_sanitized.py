"""The static program, built with sanitizers, on random networks and scans, and on mutants of both."""

import pytest

from tests.kernels.libnnturbo.conftest import cmake, missing_tools
from tests.kernels.libnnturbo.fuzz import Fuzz
from tests.paths import ROOT

pytestmark = pytest.mark.slow  # builds everything again with sanitizers, and runs it for minutes
MUTANTS, SHAPES = 300, 100


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if missing := missing_tools():
        pytest.skip(f"libnnturbo is built with tools that are not here: {missing}")
    options = ("-DNNTURBO_SANITIZE=address,undefined,float-cast-overflow", "-DBUILD_SHARED_LIBS=OFF")
    folder = tmp_path_factory.mktemp("sanitized")
    return cmake(ROOT / "kernels" / "libnnturbo", folder, *options) / "nnturbo-native"


def test_mutants_give_errors_and_never_crash(program, tmp_path):
    assert set(Fuzz([program], tmp_path).run(MUTANTS, mutates=True)) == {0, 1, 2}


def test_scans_of_random_shapes_are_segmented_by_random_networks(program, tmp_path):
    assert Fuzz([program], tmp_path, seed=1).run(SHAPES, mutates=False) == {0: SHAPES}
