"""The program, built with sanitizers or watched by valgrind, on random networks and scans, and on mutants of both."""

import shutil

import pytest

from tests.kernels.libnnturbo.conftest import cmake, missing_tools
from tests.kernels.libnnturbo.fuzz import Fuzz
from tests.paths import ROOT

pytestmark = pytest.mark.slow  # builds everything again with sanitizers, and runs it for minutes
MUTANTS, SHAPES = 300, 100
WATCHED = 30  # by valgrind, which takes seconds for each
# Threads wait for the next call as long as the process lives, so what belongs to them is never freed.
VALGRIND = ("valgrind", "-q", "--error-exitcode=99", "--leak-check=full", "--show-leak-kinds=definite,indirect",
            "--errors-for-leak-kinds=definite,indirect")  # fmt: skip


def built_with(folder, *options):
    if missing := missing_tools():
        pytest.skip(f"libnnturbo is built with tools that are not here: {missing}")
    return cmake(ROOT / "kernels" / "libnnturbo", folder, "-DBUILD_SHARED_LIBS=OFF", *options) / "nnturbo-native"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    sanitizers = "-DNNTURBO_SANITIZE=address,undefined,float-cast-overflow"
    return built_with(tmp_path_factory.mktemp("sanitized"), sanitizers)


def test_mutants_give_errors_and_never_crash(program, tmp_path):
    assert set(Fuzz([program], tmp_path).run(MUTANTS, mutates=True)) == {0, 1, 2}


def test_scans_of_random_shapes_are_segmented_by_random_networks(program, tmp_path):
    assert Fuzz([program], tmp_path, seed=1).run(SHAPES, mutates=False) == {0: SHAPES}


@pytest.mark.skipif(shutil.which(VALGRIND[0]) is None, reason="needs valgrind")
def test_valgrind_finds_nothing_in_random_shapes_and_mutants(tmp_path):
    program = built_with(tmp_path / "built", "-DNNTURBO_STATIC_COMMAND=OFF")
    in_fp32 = {"precisions": ["fp32"]}  # valgrind stands for a processor with AVX2
    assert Fuzz([*VALGRIND, program], tmp_path, seed=2, **in_fp32).run(WATCHED, mutates=False) == {0: WATCHED}
    assert {0, 2} <= set(Fuzz([*VALGRIND, program], tmp_path, seed=3, **in_fp32).run(WATCHED, mutates=True))
