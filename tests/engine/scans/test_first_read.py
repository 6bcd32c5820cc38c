"""Two threads of a fresh process that read at once, as a job's readers do."""

import os
import subprocess
import sys
import threading

import pytest
from nnturbo.engine.scans.itk import _FirstRead

from tests.engine.factory import write_scan
from tests.engine.scans.dicom_slices import write_series

READ_AT_ONCE = """
import sys, threading
from nnturbo.engine.scans.volume import read_volume

ready = threading.Barrier(2)
failures = []

def read(path):
    ready.wait()
    try:
        assert read_volume(path).array.size > 1
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=read, args=(path,)) for path in sys.argv[1:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(f"failed: {failures}" if failures else 0)
"""


@pytest.mark.parametrize("processes", [6, pytest.param(2000, marks=pytest.mark.slow)])
def test_fresh_processes_read_with_two_threads_at_once(tmp_path, processes):
    names = [("a.nii.gz", "b.nii.gz"), ("a.nii.gz", "c.nrrd"), ("a.mha", "series"), ("series", "other")]
    for name in {name for pair in names for name in pair}:
        (write_scan if "." in name else write_series)(tmp_path / name)
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    for index in range(processes):
        paths = [str(tmp_path / name) for name in names[index % len(names)]]
        done = subprocess.run(
            [sys.executable, "-c", READ_AT_ONCE, *paths], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"process {index} of {paths}: {done.stderr}"


def test_the_first_read_of_a_format_is_alone():
    first, inside, most = _FirstRead(), [], []

    def read(image_io):
        with first.alone(image_io), first.alone(image_io, ends=True):
            inside.append(image_io)
            most.append(len(inside))
            threading.Event().wait(0.02)
            inside.remove(image_io)

    for expected in (1, 4):
        most.clear()
        threads = [threading.Thread(target=read, args=("NiftiImageIO",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(most) == expected, "first one after the other, then all at once"
