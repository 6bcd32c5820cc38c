"""Every command of an install without extras works, or says in one sentence which extra it needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from nnturbo.engine.cli.main import EXTRA_OF

from tests.engine.factory import write_model
from tests.engine.jobs.test_run import write_scan

ROOT = Path(__file__).parents[3]
EXTRAS = {
    *("scipy", "matplotlib", "nnunetv2", "sklearn", "openpyxl", "PIL", "imageio", "tifffile", "imagecodecs"),
    *("highdicom", "pydicom", "openvino", "nncf", "onnx", "onnxscript", "onnxruntime", "ray", "cupy", "nvidia"),
    *("tensorrt", "tensorrt_rtx", "torch_tensorrt", "pandas", "skimage", "batchgenerators", "batchgeneratorsv2"),
}
COMMAND = f"""
import sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *of: None if name.partition(".")[0] in {EXTRAS} else found(name, *of)
from nnturbo.engine.cli import main
sys.exit(main(sys.argv[1:]))
"""
WITH = {
    "phantom -o data --train 1 --validation 0 --test 0 --small": "demo",
    "demo -m model -o shown --cases 1": "demo",
    "evaluate -p labels -r labels": "demo",
    "prepare -i data -d 501 -n X --raw raw --preprocessed ready": "training",
    "train -d 501 -c 3d_fullres --raw raw --preprocessed ready --results results": "training",
    "benchmark -m model -i scans": "training",
    "predict -i scans -o labels -m model --report": "report",
    "predict -i scans -o labels -m model --dicom_seg": "dicom",
    "predict -i scans -o labels -m model --ray local": "ray",
    "predict -i scans -o labels -m model --loader dali": "dali",
    "predict -i scans -o labels -m model --backend openvino": "openvino",
    "predict -i scans -o labels -m model --backend onnx": "onnx",
    "view labels a": "report",
    "build -m model -o bundle --precision int8 --calibration scans": "openvino",
    "build -m model -o bundle --precision bf16 --backend torch": "demo",  # which makes phantoms to compare on
}
WITHOUT = [
    "predict -i scans -o labels -m model --disable_tta --backend torch",
    "--version",
    *(
        pytest.param(line, marks=pytest.mark.thorough)
        for line in (
            "build -m model -o bundle --backend torchscript",
            "inspect model",
            "doctor",
            "publish -m model -o copy",
        )
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "model")
    (folder / "labels").mkdir()
    (folder / "scans").mkdir()
    write_scan(folder / "scans" / "a_0000.nii.gz", 0)
    return folder


def run(folder, line):
    command = [sys.executable, "-c", COMMAND, *line.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.thorough
@pytest.mark.parametrize("line", WITH)
def test_the_extra_is_named(folder, line):
    done = run(folder, line)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'nnturbo[{WITH[line]}]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", WITHOUT)
def test_none_is_needed(folder, line):
    done = run(folder, line)
    assert done.returncode == 0, done.stderr


def test_the_extras_exist_and_have_the_packages():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for module, extra in EXTRA_OF.items():
        (content,) = re.findall(rf"^{extra} = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        package = {"sklearn": "scikit-learn"}.get(module, module)
        assert f'"{package}' in content, module
