"""Where the library of kernels comes from, and what it is made of."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from nnturbo.engine.files import cache_root
from nnturbo.kernels import compilation, library
from nnturbo.kernels.compilation import FLAGS, FOLDER, SHARED, VARIANTS, compiler, here
from nnturbo.kernels.library import find_library, lacking, load_library
from nnturbo.kernels.program import variant as variant_of

KEPT = (cache_root() or Path.cwd()) / "kernels"
pytestmark = pytest.mark.skipif(lacking(KEPT) is not None, reason=str(lacking(KEPT)))

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


class TestLibrary:
    """Where it comes from."""

    @pytest.fixture(autouse=True)
    def clone(self, tmp_path, monkeypatch):
        """A place where no library came with nnturbo."""
        monkeypatch.setattr(library, "INSTALLED", tmp_path / "installed.so")

    @pytest.fixture
    def made(self, compiled_kernels, tmp_path):
        """A library that was compiled before."""
        made = tmp_path / "kept" / compiled_kernels.name
        made.parent.mkdir()
        return Path(shutil.copy(compiled_kernels, made))

    @needs_compiler
    def test_is_compiled_once_and_needed_no_more_compiler_from_then_on(self, made, monkeypatch):
        before = made.stat().st_mtime_ns
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
        assert lacking(made.parent) is None
        load_library(made.parent)
        assert [path.stat().st_mtime_ns for path in made.parent.iterdir()] == [before]

    @needs_compiler
    @pytest.mark.thorough
    def test_is_compiled_again_where_the_file_cannot_be_loaded(self, made, tmp_path):
        foreign = tmp_path / "foreign" / made.name
        foreign.parent.mkdir()
        foreign.write_bytes(b"of another system")
        assert variant_of(load_library(foreign.parent)) in VARIANTS[here()[1]]
        assert foreign.stat().st_size == made.stat().st_size

    @needs_compiler
    def test_is_that_which_came_with_nnturbo(self, made, tmp_path):
        made.rename(library.INSTALLED)
        found = find_library(tmp_path / "none")
        assert found is not None
        assert found._name == str(library.INSTALLED)
        assert not (tmp_path / "none").exists()

    def test_cannot_be_had_without_a_compiler(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        assert "one of nnturbo's wheels" in str(lacking(tmp_path))
        with pytest.raises(OSError, match="no C\\+\\+ compiler"):
            load_library(tmp_path)

    def test_a_compiler_that_only_offers_to_install_itself_is_none(self, tmp_path, monkeypatch):
        for name in ("c++", "g++", "clang++"):
            stub = tmp_path / name
            stub.write_text("#!/bin/sh\necho 'no developer tools were found, requesting install' >&2\nexit 1\n")
            stub.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        assert compiler() is None

    def test_with_a_compiler_that_fails(self, tmp_path, monkeypatch):
        broken = tmp_path / "c++"
        broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho 'fatal error: no such header' >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        with pytest.raises(OSError, match="fatal error: no such header"):
            load_library(tmp_path / "kernels")
        assert list((tmp_path / "kernels").glob("*")) == []

    def test_other_processors_are_named(self, tmp_path):
        with pytest.raises(OSError, match="for x86_64 and aarch64, not for riscv64"):
            compilation.compile_kernels(["c++"], tmp_path / "l", system="linux", processor="riscv64")


def compiled(folder, *flags, sources=()):
    """Compile sources, and the kernels for each set of instructions; gives the objects."""
    command, objects = [*(compiler() or []), *FLAGS, *flags, "-c"], []
    for source in sources:
        objects.append(folder / f"{source}.o")
        subprocess.run([*command, FOLDER / source, "-o", objects[-1]], check=True)
    for variant, instructions in VARIANTS[here()[1]].items():
        objects.append(folder / f"{variant}.o")
        source = FOLDER / compilation.VARIED
        subprocess.run([*command, *instructions, f"-DVARIANT={variant}", source, "-o", objects[-1]], check=True)
    return objects


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("optimised", ["-O3", pytest.param("-O1", marks=pytest.mark.thorough)])
def test_nothing_compiled_for_some_processors_can_stand_in_for_what_runs_on_all(tmp_path, optimised):
    """A linker keeps one of several copies of an inline function: that of the wrong instructions would end others."""
    for path in compiled(tmp_path, optimised):
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        shared = [line.split()[2] for line in symbols.splitlines() if line.split()[1] in "WT"]
        assert not set(shared) - {"__clang_call_terminate"}


@pytest.mark.thorough
@needs_compiler
@pytest.mark.parametrize("watched", ["address,undefined", "thread"])
def test_memory_and_threads_are_clean(tmp_path, watched):
    flags = ["-O1", f"-fsanitize={watched}", "-fno-sanitize-recover=all"]
    objects = compiled(tmp_path, *flags, sources=SHARED)
    for name in ("convolution_bounds", "program_mutations", "concurrent_runs"):
        program, source = tmp_path / name, Path(__file__).with_name(f"{name}.cpp")
        subprocess.run([*(compiler() or []), *flags, "-pthread", source, *objects, "-o", program], check=True)
        for variant in VARIANTS[here()[1]]:
            # Leaks are not looked for: crews are never ended, on purpose.
            given = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
            done = subprocess.run([program, variant], capture_output=True, text=True, check=False, env=given)
            if done.returncode != 77:  # this processor lacks the instructions
                assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]
