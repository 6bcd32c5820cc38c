"""What the package exports, and what importing it costs."""

import os
import subprocess
import sys
from pathlib import Path

import nnturbo.engine
import nnturbo.kernels
import pytest
from nnturbo.engine.cli import main

import nnturbo

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", [nnturbo.engine, nnturbo.kernels])
def test_what_is_exported_is_there(package):
    assert sorted(package.__all__) == package.__all__ or package is nnturbo.kernels
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    assert len(set(package.__all__)) == len(package.__all__)


def test_a_name_that_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        nnturbo.engine.Motor  # noqa: B018


def test_importing_the_engine_stays_light():
    heavy = [
        "scipy",
        "skimage",
        "pandas",
        "matplotlib",
        "torch._dynamo",
        "SimpleITK",
        "imageio",
        "tifffile",
        "nnunetv2",
        "tqdm",
        "cupy",
        "openvino",
        "ray",
        "dynamic_network_architectures",
    ]
    code = f"import sys\nfrom nnturbo.engine import Engine, Volume\nprint([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    baseline = f"import sys, torch\nprint([m for m in {heavy} if m in sys.modules])"
    with_torch = subprocess.run(
        [sys.executable, "-c", baseline], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert loaded == with_torch


def test_the_command_says_its_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nnturbo {nnturbo.__version__}\n"


def test_a_folder_of_the_same_name_hides_nothing(tmp_path):
    (tmp_path / "nnturbo" / "engine").mkdir(parents=True)
    code = "import nnturbo.engine, nnturbo.training.cli; print(nnturbo.__version__, nnturbo.engine.__file__)"
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [nnturbo.__version__, str(ROOT / "engine" / "__init__.py")]
