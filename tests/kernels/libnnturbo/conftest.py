"""libnnturbo and its stages, built once for all tests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from tests.kernels.libnnturbo.stages import Stages

BUILD_FOLDER = "NNTURBO_LIBRARY_BUILD"  # keeps the build from one run of these tests to the next
HEADERS = {"nlohmann/json.hpp": "nlohmann-json3-dev", "nifti/nifti2.h": "libnifti2-dev", "zlib.h": "zlib1g-dev"}


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


def cmake(source, folder, *options):
    """Configure and build."""
    for step in (
        ["cmake", "-S", source, "-B", folder, "-DNNTURBO_WARNINGS_AS_ERRORS=ON", *options],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def built(run_folder):
    if missing := missing_tools():
        pytest.skip(f"libnnturbo is built with tools that are not here: {missing}")
    folder = Path(os.environ.get(BUILD_FOLDER) or run_folder / "libnnturbo")
    with FileLock(f"{folder}.lock"):
        return cmake(Path(__file__).parent, folder)


@pytest.fixture(scope="session")
def stages(built):
    return Stages(built / "libstages.so")
