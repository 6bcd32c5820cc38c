"""What is installed: a wheel for a system and any Python, with the kernels in it; an editable install."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from nnturbo.kernels.compilation import compiler, here, library_name

from nnturbo import __version__

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    int(setuptools.__version__.split(".")[0]) < 77, reason="needs setuptools 77, which knows license expressions"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository to build in, with what git does not ignore."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a clone, and git")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    folder = tmp_path_factory.mktemp("source")
    for name in map(os.fsdecode, listed.stdout.splitlines()):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def built(source, out, **environment):
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    given = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, out], cwd=source, env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(Path(out).glob("*.whl"))


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.thorough
def test_a_wheel_has_the_kernels_and_is_for_any_python(source, tmp_path):
    wheel = built(source, tmp_path)
    assert re.fullmatch(rf"nnturbo-{re.escape(__version__)}-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as content:
        assert content.getinfo(f"nnturbo/kernels/{library_name(here()[0])}").file_size < 2**20
        assert {"nnturbo/__init__.py", "nnturbo/py.typed", "nnturbo/kernels/cpu/kernels.h"} <= set(content.namelist())
        (name,) = [name for name in content.namelist() if name.endswith("METADATA")]
        metadata = email.message_from_string(content.read(name).decode())
    assert metadata["Version"] == __version__
    description = str(metadata.get_payload())
    assert "# nnturbo" in description
    assert not re.search(r"\]\((?!https:)", description), "a link that leads nowhere on an index"


def test_without_a_compiler_a_wheel_does_without_kernels(source, tmp_path):
    stub = tmp_path / "none"
    stub.mkdir()
    wheel = built(source, tmp_path, PATH=str(stub), CXX="")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_type_checkers_follow_an_editable_install(source, tmp_path):
    """They read folders in .pth files, and no import hooks."""
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as content:
        (name,) = [name for name in content.namelist() if name.endswith(".pth")]
        folder = Path(content.read(name).decode().strip())
    assert (folder / "nnturbo" / "__init__.py").is_file()
    assert (folder / "nnturbo" / "engine" / "cli" / "main.py").is_file()
    assert (folder / "nnturbo" / "py.typed").is_file()
