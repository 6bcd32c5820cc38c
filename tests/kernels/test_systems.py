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
    OF_SYSTEM,
    SHARED,
    VARIANTS,
    VARIED,
    compile_kernels,
    compiler,
    here,
    library_name,
)

TWINS = ("convolution_twins.cpp", "int16_twins.cpp")
LACKS_INSTRUCTIONS = 77
WINE = shutil.which("wine64") or next((str(path) for path in Path("/usr/lib/wine").glob("wine64")), "wine64")
MINGW = shutil.which("x86_64-w64-mingw32-g++-posix") or "x86_64-w64-mingw32-g++"

SYSTEMS = {
    "here": (compiler() or ["c++"], *here(), ()),
    "linux on arm": (["aarch64-linux-gnu-g++"], "linux", "aarch64", ("qemu-aarch64",)),
    "windows": ([MINGW], "windows", "x86_64", (WINE,)),
}


def needed(name):
    """Skip what this machine lacks."""
    command, system, processor, emulator = SYSTEMS[name]
    for tool in (command[0], *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    if processor not in VARIANTS:
        pytest.skip(f"there are no kernels for {processor}")
    if system not in LINKED:
        pytest.skip(f"nothing is linked for {system}")
    return command, system, processor, emulator


def compiled_twins(name, folder):
    """Compile the kernels once, and make a program of each comparison with plain loops."""
    command, system, processor, emulator = needed(name)
    flags, objects = [*FLAGS, *OF_SYSTEM[system]], []
    for source in SHARED:
        objects.append(folder / f"{source}.o")
        subprocess.run([*command, *flags, "-c", FOLDER / source, "-o", objects[-1]], check=True)
    for variant, instructions in VARIANTS[processor].items():
        objects.append(folder / f"{variant}.o")
        varied = [f"-DVARIANT={variant}", "-c", FOLDER / VARIED, "-o", objects[-1]]
        subprocess.run([*command, *flags, *instructions, *varied], check=True)
    for source in TWINS:
        program, static = folder / f"{source}.exe", ["-static"] if emulator else []
        source = Path(__file__).with_name(source)
        subprocess.run([*command, *FLAGS, *static, source, *objects, "-o", program], check=True)
        yield program


@pytest.mark.thorough
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_function_gives_what_plain_loops_give(tmp_path, name):
    _, _, processor, emulator = needed(name)
    programs = list(compiled_twins(name, tmp_path))
    given = {**os.environ, "WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all"}
    subprocess.run([*emulator, programs[0], "none"], capture_output=True, check=False, env=given)  # sets wine up
    ran = set()
    for variant in 3 * [*VARIANTS[processor]]:  # what lies wrong on a stack shows in some runs only
        for program in programs:
            done = subprocess.run([*emulator, program, variant], capture_output=True, text=True, check=False, env=given)
            if done.returncode != LACKS_INSTRUCTIONS:
                assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, [f"{variant}: 0 faults"]), done.stdout
                ran.add(program)
    assert programs[0] in ran  # products in int16 are not on all processors


def check_library(library):
    assert library.stat().st_size < 2**20
    content = library.read_bytes()
    for needed_elsewhere in (b"libstdc++", b"libgcc_s", b"libwinpthread"):
        assert needed_elsewhere not in content.replace(b"libstdc++ demangler", b"")
    assert b"nnturbo_program_run" in content


def test_the_library_is_small_and_needs_nothing_but_the_system(compiled_kernels):
    check_library(compiled_kernels)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "here"])
def test_those_for_other_systems_are_so_too(tmp_path, name):
    command, system, processor, _ = needed(name)
    library = tmp_path / library_name(system)
    compile_kernels(command, library, system=system, processor=processor)
    check_library(library)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.thorough
def test_no_vector_is_moved_as_if_stacks_were_aligned_on_windows(tmp_path):
    """MinGW aligns them to 16 bytes, and may all the same move vectors as if to 64 (GCC's bug 54412)."""
    command, system, processor, _ = needed("windows")
    library = tmp_path / library_name(system)
    compile_kernels(command, library, system=system, processor=processor)
    text = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    aligned = [line.partition("vmov")[2] for line in text.splitlines() if "vmovap" in line or "vmovdqa" in line]
    assert not [line for line in aligned if "(" in line and ("%ymm" in line or "%zmm" in line)]
    assert "vmovups" in text
