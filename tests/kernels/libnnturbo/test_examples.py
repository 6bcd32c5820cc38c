"""Programs in C, C++ and Python that use the installed library."""

import subprocess
import sys

import pytest
from nnturbo.engine import build as build_bundle

from tests.engine.factory import multi_task, plans_json, write_model
from tests.kernels.libnnturbo.conftest import cmake
from tests.paths import ROOT

pytestmark = pytest.mark.thorough  # the library is built for half a minute
EXAMPLES = ROOT / "examples" / "native"
LARGEST_BYTES = 1_500_000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "m", plans=multi_task(plans_json()))
    return build_bundle(folder, folder.parent / "bundle", backend="native", device="cpu")


@pytest.fixture(scope="module")
def prefix(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix")
    command = ["cmake", "--install", built / "libnnturbo", "--prefix", folder, "--strip"]
    subprocess.run(command, capture_output=True, check=True)
    return folder


def test_programs_in_c_and_cpp_find_the_package(prefix, bundle, tmp_path):
    cmake(EXAMPLES, tmp_path / "built", f"-DCMAKE_PREFIX_PATH={prefix}")
    for name in ("segment_c", "segment_cpp"):
        result = subprocess.run([tmp_path / "built" / name, bundle], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "pancreas: " in result.stdout
        assert "lesion: " in result.stdout
        result = subprocess.run([tmp_path / "built" / name, tmp_path], capture_output=True, text=True, check=False)
        assert result.returncode in (1, 2)
        assert "must be a folder with engine.json" in result.stderr


def test_python_needs_ctypes_alone(prefix, bundle):
    (library,) = prefix.glob("lib*/**/libnnturbo.so")
    command = [sys.executable, "-I", "-S", EXAMPLES / "segment.py", library, bundle]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("{")


def test_the_library_is_small_and_shows_its_header_alone(prefix):
    (library,) = prefix.glob("lib*/**/libnnturbo.so.*.*")
    assert library.stat().st_size < LARGEST_BYTES
    shown = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    names = {line.split()[-1].partition("@")[0] for line in shown.stdout.splitlines()}
    declared = {"version", "defaults", "open", "close", "describe", "predict", "free"}
    assert names == {f"nnturbo_{name}" for name in declared}
    linked = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "stdc++" not in linked
