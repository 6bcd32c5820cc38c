"""The static program, built with sanitizers, on mutated bundles and scans."""

from pathlib import Path

import pytest
from nnturbo.engine import build as build_bundle

from tests.engine.factory import multi_task, plans_json, smooth_scan, write_model
from tests.kernels.libnnturbo.conftest import cmake, missing_tools
from tests.kernels.libnnturbo.fuzz import fuzz
from tests.kernels.libnnturbo.nifti import write_nifti
from tests.paths import ROOT

pytestmark = pytest.mark.slow  # builds everything again with sanitizers, and runs it for minutes
MUTANTS = 300


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if missing := missing_tools():
        pytest.skip(f"libnnturbo is built with tools that are not here: {missing}")
    options = ("-DNNTURBO_SANITIZE=address,undefined", "-DBUILD_SHARED_LIBS=OFF")
    folder = tmp_path_factory.mktemp("sanitized")
    return cmake(ROOT / "kernels" / "libnnturbo", folder, *options) / "nnturbo-native"


def test_mutants_give_errors_and_never_crash(program, tmp_path):
    folder = write_model(tmp_path / "m", plans=multi_task(plans_json()))
    bundle = build_bundle(folder, tmp_path / "bundle", backend="native", device="cpu")
    scan = write_nifti(tmp_path / "scan.nii", smooth_scan((5, 9, 11)))
    statuses = fuzz(program, Path(bundle), scan, MUTANTS)
    assert set(statuses) == {0, 1, 2}
