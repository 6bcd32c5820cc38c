"""Programs that call nnU-Net, with nnturbo under them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine import ModelError
from nnturbo.engine.cli import main
from nnturbo.engine.nnunet import accelerated, acceleration
from nnturbo.engine.nnunet.acceleration import command_of

from tests.engine.factory import write_model
from tests.engine.nnunet.predictors import write_scan

PROGRAM = """
import json, multiprocessing, os, subprocess, sys


def kind(_=None):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    return nnUNetPredictor.__module__


if __name__ == "__main__":
    found = {"here": kind(), "arguments": sys.argv[1:]}
    for method in os.environ["PROCESSES"].split():
        if method == "child":
            command = [sys.executable, "-c", "from program import kind; print(kind())"]
            found[method] = subprocess.check_output(command, text=True).strip()
        elif method in multiprocessing.get_all_start_methods():
            with multiprocessing.get_context(method).Pool(1) as pool:
                (found[method],) = pool.map(kind, [0])
    print(json.dumps(found))
    sys.exit(3)
"""
OURS = "nnturbo.engine.nnunet.predictor"


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "nnturbo.engine.cli", "run", *map(str, arguments)],
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize(
    "processes", ["", *(pytest.param(kinds, marks=pytest.mark.thorough) for kinds in ("child", "spawn fork"))]
)
def test_a_program_and_its_processes_get_our_predictor(program, processes):
    path = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    given = {**os.environ, "PYTHONPATH": path, "PROCESSES": processes}
    done = run(program, "-i", "ct.nii.gz", "--help", env=given)
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("arguments") == ["-i", "ct.nii.gz", "--help"]
    assert {"here", *processes.split()[:1]} <= found.keys()
    assert set(found.values()) == {OURS}


@pytest.mark.thorough
def test_a_console_script_and_a_module(program, tmp_path):
    script = tmp_path / "segment"
    script.write_text(f"#!{sys.executable}\n{PROGRAM}")
    script.chmod(0o755)
    paths = {"PATH": tmp_path, "PYTHONPATH": tmp_path}
    found = {name: os.pathsep.join([str(path), os.environ.get(name, "")]) for name, path in paths.items()}
    for command in (["segment"], ["python", "-m", "program"]):
        done = run(*command, env={**os.environ, **found, "PROCESSES": ""})
        assert json.loads(done.stdout.splitlines()[-1])["here"] == OURS


@pytest.mark.thorough
def test_a_sitecustomize_of_the_user_runs_too(program, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import sys; sys.stderr.write('mine ran\\n')")
    done = run(
        program,
        env={
            **os.environ,
            "PROCESSES": "",
            "PYTHONPATH": os.pathsep.join([str(own), str(program.parent), os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert "mine ran" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["here"] == OURS


def test_nnunets_commands_are_ours(tmp_path):
    model, scans = write_model(tmp_path / "m"), tmp_path / "scans"
    scans.mkdir()
    write_scan(scans / "a_0000.nii.gz")
    code = "import subprocess, sys; sys.exit(subprocess.call(['nnUNetv2_predict_from_modelfolder', *sys.argv[1:]]))"
    (tmp_path / "caller.py").write_text(code)
    done = run(
        tmp_path / "caller.py", "-i", scans, "-o", tmp_path / "out", "-m", model, "-f", "0", "-device", "cpu",
        "--disable_tta", "-npp", "1", "-nps", "1", "--disable_progress_bar", "--verbose",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "records" / "a.json").exists()  # which only nnturbo writes
    assert np.any(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz"))))


class TestInPython:
    def test_a_block_is_accelerated(self):
        from nnunetv2.inference import predict_from_raw_data as module

        stock, path = module.nnUNetPredictor, os.environ["PATH"]
        with accelerated():
            assert module.nnUNetPredictor.__module__ == OURS
            assert os.environ["PATH"] != path
        assert module.nnUNetPredictor is stock
        assert os.environ["PATH"] == path

    @pytest.mark.thorough
    def test_the_processes_that_a_block_starts_are_too(self):
        code = "import nnunetv2.inference.predict_from_raw_data as m; print(m.nnUNetPredictor.__module__)"
        with accelerated():
            assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == OURS


class TestWhatCannotRun:
    @pytest.mark.parametrize(
        ("program", "message"),
        [
            (
                "no_such_program",
                "no_such_program must be a program on the PATH or a .py file; nothing of this name is there",
            ),
            ("nowhere.py", "nothing of this name is there"),
            ("ls", "nnturbo run starts Python programs, and .*ls is not one"),
        ],
    )
    def test_is_named(self, program, message, capsys):
        assert main(["run", program]) == 2
        with pytest.raises(ValueError, match=message):
            command_of(program)
        assert capsys.readouterr().err.startswith("nnturbo: ")

    def test_a_shell_script(self, tmp_path):
        script = tmp_path / "script"
        script.write_text("#!/bin/sh\nexit 0\n")
        script.chmod(0o755)
        with pytest.raises(ValueError, match="write nnturbo run before the Python program that it starts"):
            command_of(str(script))

    def test_without_nnunet(self, program, monkeypatch):
        monkeypatch.setattr(acceleration.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModelError, match="pip install nnunetv2, or use nnturbo predict"):
            acceleration.run(str(program), [])

    def test_a_python_without_nnturbo_says_so(self, tmp_path):
        (tmp_path / "nnturbo.py").write_text("raise ImportError('not here')")
        path = os.pathsep.join([str(acceleration.STARTUP), str(tmp_path)])
        done = subprocess.run(
            [sys.executable, "-c", "print('runs')"], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert "has no nnturbo (not here); nnU-Net runs as it is there" in done.stderr
        assert done.stdout == "runs\n"


def test_a_long_first_line_is_understood(tmp_path):
    script = tmp_path / "long"
    script.write_text(f"#!/bin/sh\n'''exec' {sys.executable} \"$0\" \"$@\"\n' '''\n")
    script.chmod(0o755)
    assert command_of(str(script)) == [str(script)]
