"""Trainings that the system ends at random moments, twenty times in all, end as if nothing had happened."""

import os
import random
import re
import signal
import subprocess
import sys

import pytest

from tests.training.test_interruptions import SHORT, kept_checkpoint, settings
from tests.training.tiny import assert_same

KILLS = 5
"""Of each of the four presets."""
ENTRIES = SHORT | {"epochs": 5, "validate_every": 1, "patience": 1, "annealing_epochs": 2, "save_every": 1}
SCRIPT = """
import signal, sys, time
from nnturbo.engine.cli import main
from tests.training.tiny import import_nnunet

import_nnunet()
until_killed, *command = sys.argv[1:]
began = time.process_time()
# The system ends the process, and Python is not asked, after so many seconds of computing: a busy machine only makes
# them longer.
signal.setitimer(signal.ITIMER_PROF, float(until_killed))
status = main(command)
print("computed for", time.process_time() - began)
sys.exit(status)
"""


@pytest.fixture
def training(tiny, tmp_path):
    """Run `nnturbo train` as a process of its own, without processes for augmentation, until it ends or is killed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "nnUNet_n_proc_DA": "0",
        "OMP_NUM_THREADS": "1",
    }
    places = {"--raw": tiny.raw, "--preprocessed": tiny.preprocessed}
    given = ["-d", "7", "-p", tiny.plans_name, "-device", "cpu", *(part for pair in places.items() for part in pair)]

    def run(results, *flags, until_killed=0.0):
        line = [sys.executable, "-c", SCRIPT, until_killed, "train", *given, "--results", results, *flags]
        ended = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment, check=False)
        assert ended.returncode in (0, -signal.SIGPROF), ended.stderr
        return ended

    return run


@pytest.mark.slow  # starts about forty trainings: several minutes
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="only POSIX ends a process after so much computing")
@pytest.mark.parametrize("preset", ["balanced", "aggressive", "conservative", "segmentation_focused"])
def test_killed_at_random_moments(training, tmp_path, preset):
    rng = random.Random(preset)
    flags = ["--preset", preset, "--set", *settings(ENTRIES)]
    undisturbed = training(tmp_path / "whole", *flags)
    assert undisturbed.returncode == 0
    seconds = float(re.search("computed for (.+)", undisturbed.stdout)[1])
    kills, attempt = 0, 0
    while kills < KILLS:
        results, is_finished, attempt = tmp_path / f"killed{attempt}", False, attempt + 1
        while not is_finished:
            has_begun = any(results.rglob("checkpoint_*.pth"))
            kept = flags if not has_begun or rng.random() < 0.5 else []
            resumed = ["--continue"] if has_begun else []
            until_killed = rng.uniform(0, seconds) if kills < KILLS else 0
            is_finished = training(results, *kept, *resumed, until_killed=until_killed).returncode == 0
            kills += not is_finished
        for name in ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_best_score.pth"):
            assert_same(kept_checkpoint(results, name), kept_checkpoint(tmp_path / "whole", name))
        histories = [next(folder.rglob("history.csv")).read_text() for folder in (tmp_path / "whole", results)]
        assert histories[0] == histories[1]
