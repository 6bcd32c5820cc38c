"""The kernels against plain loops, here and on what can be stood in for: ARM by qemu, Windows by wine."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from nnturbo.kernels.compilation import (
    FLAGS,
    FOLDER,
    LINKED,
    VARIANTS,
    VARIED,
    compile_kernels,
    compiler,
    here,
    library_name,
)

TWINS = Path(__file__).with_name("convolution_twins.cpp")
LACKS_INSTRUCTIONS = 77
WINE = shutil.which("wine64") or next((str(path) for path in Path("/usr/lib/wine").glob("wine64")), "wine64")
MINGW = shutil.which("x86_64-w64-mingw32-g++-posix") or "x86_64-w64-mingw32-g++"

SYSTEMS = {
    "here": (compiler() or ["c++"], here()[1], ()),
    "linux on arm": (["aarch64-linux-gnu-g++"], "aarch64", ("qemu-aarch64",)),
    "windows": ([MINGW], "x86_64", (WINE,)),
}


def needed(name):
    """Skip what this machine lacks."""
    command, processor, emulator = SYSTEMS[name]
    for tool in (command[0], *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    if processor not in VARIANTS:
        pytest.skip(f"there are no kernels for {processor}")
    return command, processor, emulator


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_function_gives_what_plain_loops_give(tmp_path, name):
    command, processor, emulator = needed(name)
    program, objects = tmp_path / "twins.exe", []
    for source in (FOLDER / "threads.cpp", TWINS):
        objects.append(tmp_path / f"{source.name}.o")
        subprocess.run([*command, *FLAGS, "-c", source, "-o", objects[-1]], check=True)
    for variant, flags in VARIANTS[processor].items():
        objects.append(tmp_path / f"{variant}.o")
        varied = [f"-DVARIANT={variant}", "-c", FOLDER / VARIED, "-o", objects[-1]]
        subprocess.run([*command, *FLAGS, *flags, *varied], check=True)
    static = ["-static"] if emulator else []
    subprocess.run([*command, *static, "-pthread", *objects, "-o", program], check=True)
    given = {**os.environ, "WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    subprocess.run([*emulator, program, "none"], capture_output=True, check=False, env=given)  # sets wine up
    ran = []
    for variant in VARIANTS[processor]:
        done = subprocess.run([*emulator, program, variant], capture_output=True, text=True, check=False, env=given)
        if done.returncode != LACKS_INSTRUCTIONS:
            assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [f"{variant}: 0 faults"]), done.stdout
            ran.append(variant)
    assert ran


@pytest.mark.parametrize(("name", "system"), [("here", here()[0]), ("linux on arm", "linux"), ("windows", "windows")])
def test_the_library_is_small_and_needs_nothing_but_the_system(tmp_path, name, system):
    command, processor, _ = needed(name)
    if system not in LINKED:
        pytest.skip(f"nothing is linked for {system}")
    library = tmp_path / library_name(system)
    compile_kernels(command, library, system=system, processor=processor)
    assert library.stat().st_size < 2**20
    content = library.read_bytes()
    for needed_elsewhere in (b"libstdc++", b"libgcc_s", b"libwinpthread"):
        assert needed_elsewhere not in content.replace(b"libstdc++ demangler", b"")
    assert b"nnturbo_convolve" in content
