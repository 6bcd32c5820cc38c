"""libnnturbo by other compilers and for other systems: ARM by qemu, Windows by wine; a program in C tells the same."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from nnturbo.engine import build as build_bundle

from tests.engine.factory import multi_task, plans_json, write_model
from tests.kernels.libnnturbo.conftest import cmake
from tests.kernels.libnnturbo.test_examples import EXAMPLES, LARGEST_BYTES
from tests.kernels.test_systems import WINE
from tests.paths import ROOT

pytestmark = pytest.mark.slow  # builds the library for a minute each
JSON_HEADERS = Path("/usr/include/nlohmann")
MINGW = "x86_64-w64-mingw32-gcc-posix"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What to build with and run by.

    Args:
        compilers: For C, C++ and what makes files smaller.
        library: Its file.
        options: Of CMake.
        emulator: What runs programs for it.
    """

    compilers: tuple[str, str, str]
    library: str = "libnnturbo.so"
    options: tuple[str, ...] = ()
    emulator: tuple[str, ...] = ()


ARM = "aarch64-linux-gnu-"
GCC = System(compilers=("gcc", "g++", "strip"))
SYSTEMS = {
    "clang": System(compilers=("clang", "clang++", "strip")),
    "linux on arm": System(
        compilers=(f"{ARM}gcc", f"{ARM}g++", f"{ARM}strip"),
        options=("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"),
        emulator=("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    ),
    "windows": System(
        compilers=(MINGW, MINGW.replace("gcc", "g++"), "x86_64-w64-mingw32-strip"),
        library="libnnturbo.dll",
        options=("-DCMAKE_SYSTEM_NAME=Windows", "-DCMAKE_SYSTEM_PROCESSOR=x86_64"),
        emulator=(WINE,),
    ),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "m", plans=multi_task(plans_json()))
    return build_bundle(folder, folder.parent / "bundle", backend="native", device="cpu")


def needed(system):
    """Skip what this machine lacks."""
    for tool in ("cmake", *system.compilers, *system.emulator[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    if not JSON_HEADERS.is_dir():
        pytest.skip("needs nlohmann-json3-dev")


def headers_alone(folder):
    """Give nlohmann's headers without this system's others beside them."""
    folder.mkdir()
    (folder / "nlohmann").symlink_to(JSON_HEADERS)
    return folder


def build_and_run(system, bundle, folder):
    """Build the library and the program in C, and return the library's file and what the program prints."""
    c, cpp, strip = system.compilers
    options = (f"-DCMAKE_CXX_COMPILER={cpp}", f"-DNLOHMANN_JSON_INCLUDE_DIR={headers_alone(folder / 'headers')}")
    source = ROOT / "kernels" / "libnnturbo"
    cmake(source, folder / "built", *options, *system.options, "-DNNTURBO_BUILD_COMMAND=OFF")
    library, program = folder / "built" / system.library, folder / "built" / "segment.exe"
    given = ("-I", source / "include", EXAMPLES / "segment.c", library, "-Wl,-rpath,$ORIGIN", "-o", program)
    subprocess.run([c, "-Wall", "-Wextra", "-Werror", "-DNNTURBO_SHARED", *given], check=True)
    environment = {**os.environ, "WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all"}
    result = subprocess.run(
        [*system.emulator, program, bundle], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    subprocess.run([strip, library], check=True)
    return library, result.stdout.split()


@pytest.fixture(scope="module")
def expected(bundle, tmp_path_factory):
    needed(GCC)
    _, told = build_and_run(GCC, bundle, tmp_path_factory.mktemp("here"))
    return told


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_program_in_c_tells_the_same(name, expected, bundle, tmp_path):
    needed(SYSTEMS[name])
    library, told = build_and_run(SYSTEMS[name], bundle, tmp_path)
    assert library.stat().st_size < LARGEST_BYTES
    assert "class" in expected
    assert told == expected
