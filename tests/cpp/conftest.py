"""The C++ library and its command, built once for all tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.paths import ROOT

SOURCE = ROOT / "examples" / "cpp"
HEADERS = {
    "nifti/nifti1.h": "libnifti2-dev",
    "openssl/evp.h": "libssl-dev",
    "nlohmann/json.hpp": "nlohmann-json3-dev",
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


def cmake(source, folder, *prefixes):
    prefix = ";".join([torch.utils.cmake_prefix_path, *map(str, prefixes)])
    for step in (
        ["cmake", "-S", source, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}", "-DNNTURBO_WARNINGS_AS_ERRORS=ON"],
        ["cmake", "--build", folder],
    ):
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    if missing := missing_tools():
        pytest.skip(f"the C++ library is built with tools that are not here: {missing}")
    return cmake(SOURCE, Path(os.environ.get(BUILD_FOLDER) or tmp_path_factory.mktemp("build")))


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
