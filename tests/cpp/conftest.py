"""The C++ library and its command, built once for all tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock
from nnturbo.engine import build as build_bundle

from tests.cpp.factory import SHAPE, SOURCE, cmake, write_scan
from tests.engine.factory import multi_task, plans_json, smooth_scan, write_model

HEADERS = {
    "nifti/nifti2.h": "libnifti2-dev",
    "openssl/evp.h": "libssl-dev",
    "nlohmann/json.hpp": "nlohmann-json3-dev",
    "zlib.h": "zlib1g-dev",
}
BUILD_FOLDER = "NNTURBO_CPP_BUILD"  # keeps the build from one run of these tests to the next


def missing_tools():
    """Say what the build needs and this machine lacks, or return an empty text."""
    tools = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    if "g++" in tools:
        return ", ".join(tools)
    for header, package in HEADERS.items():
        found = subprocess.run(
            ["g++", "-x", "c++", "-fsyntax-only", "-include", header, os.devnull], capture_output=True, check=False
        )
        tools += [] if found.returncode == 0 else [package]
    return ", ".join(tools)


@pytest.fixture(scope="session")
def built(run_folder):
    if missing := missing_tools():
        pytest.skip(f"the C++ library is built with tools that are not here: {missing}")
    folder = Path(os.environ.get(BUILD_FOLDER) or run_folder / "cpp")
    with FileLock(f"{folder}.lock"):
        return cmake(SOURCE, folder)


@pytest.fixture(scope="session")
def command(built):
    def run(*arguments, **environment):
        return subprocess.run(
            [built / "nnturbo_predict", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("multi_task") / "m", plans=multi_task(plans_json()), folds=("0", "1"))


@pytest.fixture(scope="module")
def bundle(model):
    return build_bundle(model, model.parent / "bundle", backend="torchscript", device="cpu")


@pytest.fixture(scope="module")
def native_bundle(model):
    return build_bundle(model, model.parent / "native", backend="native", device="cpu")


@pytest.fixture
def own_bundle(bundle, tmp_path):
    """A bundle to spoil."""
    return shutil.copytree(bundle, tmp_path / "spoilt")


@pytest.fixture
def own_native_bundle(native_bundle, tmp_path):
    return shutil.copytree(native_bundle, tmp_path / "spoilt_native")


@pytest.fixture
def scan(tmp_path):
    return write_scan(tmp_path / "scan.nii.gz", smooth_scan(SHAPE))
