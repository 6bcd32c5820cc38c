"""Random networks, scans of random shapes, and mutants of both, for a program that was built with sanitizers.

    python -m tests.kernels.libnnturbo.fuzz shapes|mutants PROGRAM COUNT [SEED [PRECISION ...]]

Every scan of a random shape must be segmented. Every mutant must end with an error, or be fine; the hashes of mutated
files are written into the manifest, so that the checks behind them are reached. Bundles are in fp32 and int16 in turn,
where this processor multiplies that, or in the given precisions. PROGRAM may be several words, such as
"valgrind -q --error-exitcode=99 build/nnturbo-native", of a build with -DNNTURBO_STATIC_COMMAND=OFF: valgrind watches
the memory of no static program, and multiplies in fp32 alone.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from nnturbo.engine import BundleError, Volume, build
from nnturbo.engine.backends.native import PRECISIONS, NativeBackend

from tests.cpp.factory import write_manifest
from tests.kernels.libnnturbo.nifti import write_nifti
from tests.kernels.libnnturbo.random_models import write_random_model

LONGEST_S = 900
OF_EACH_MODEL = 50
ATTEMPTS = 10
TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
VALUES = (
    b"0", b"-1", b"1", b"7", b"65536", b"2147483648", b"99999999999999999999", b"1e308", b"true", b"false", b"null",
    b'"x"', b"[]",
)  # fmt: skip


def mutated(content, luck):
    """Change, drop or repeat some bytes; in JSON also whole numbers, and whether something is so."""
    content = bytearray(content)
    for _ in range(int(luck.integers(1, 4))):
        # Headers are where decisions are made.
        place = int(luck.integers(min(len(content), 600 if luck.random() < 0.6 else len(content))))
        kind = luck.integers(5)
        if kind == 0:
            content[place] ^= 1 << int(luck.integers(8))
        elif kind == 1:
            content[place] = int(luck.choice([0, 1, 127, 128, 255]))
        elif kind == 2:
            del content[place : place + int(luck.integers(1, 40))]
        elif kind == 3:
            content[place:place] = content[place : place + int(luck.integers(1, 40))]
        else:
            _replace_value(content, luck)
        content = content or bytearray(b"\0")
    return bytes(content)


def _replace_value(content, luck):
    places = [found.span() for found in re.finditer(rb"\d+|true|false", content[:200_000])]
    if places:
        start, end = places[int(luck.integers(len(places)))]
        content[start:end] = VALUES[int(luck.integers(len(VALUES)))]


def usable_precisions():
    """Name those in which bundles can be built here."""
    return [each for each in PRECISIONS if NativeBackend().unavailable(torch.device("cpu"), each) is None]


class Fuzz:
    """Runs a program again and again.

    Args:
        program: Words of a command.
        folder: For models, bundles and scans.
        seed: Of all that is random.
        precisions: Of the bundles, in turn.
    """

    def __init__(self, program, folder, seed=0, precisions=None):
        self.program, self.folder, self.seed = program, Path(folder), seed
        self.precisions = precisions or usable_precisions()
        self.statuses, self.bundle, self.channels = {}, None, 0

    def run(self, count, *, mutates):
        """Run so many cases; returns how often the program ended with each status.

        Raises:
            AssertionError: Where it crashed or should not have failed; the text says what the sanitizer said.
        """
        for index in range(count):
            if index % OF_EACH_MODEL == 0:
                self._next_model(index)
            luck = np.random.default_rng([self.seed, index])
            with tempfile.TemporaryDirectory(dir=self.folder) as name:
                status = self._case(luck, Path(name), f"case {index} of seed {self.seed}", mutates=mutates)
            self.statuses[status] = self.statuses.get(status, 0) + 1
            if index % 1000 == 999:
                sys.stdout.write(f"{index + 1} cases: {self.statuses}\n")
                sys.stdout.flush()
        return self.statuses

    def _next_model(self, index):
        precision = self.precisions[index // OF_EACH_MODEL % len(self.precisions)]
        for attempt in range(1, ATTEMPTS + 1):
            luck = np.random.default_rng([self.seed, index, attempt])
            try:
                return self._write_model(luck, precision)
            except BundleError:  # random weights that find nothing on a random scan, by which int16 is measured
                if precision == "fp32" or attempt == ATTEMPTS:
                    raise

    def _write_model(self, luck, precision):
        shutil.rmtree(self.folder / "model", ignore_errors=True)
        shutil.rmtree(self.folder / "bundle", ignore_errors=True)
        model, self.channels = write_random_model(luck, self.folder / "model")
        options = {"backend": "native", "device": "cpu", "precision": precision}
        if precision != "fp32":  # a measurement that decides nothing
            scan = luck.normal(size=(self.channels, 6, 9, 8)).astype(np.float32)
            options |= {"calibration": [Volume.from_array(scan, (2.0, 1.5, 1.5))], "floor": 0.0}
        self.bundle = build(model, self.folder / "bundle", **options)

    def _case(self, luck, folder, what, *, mutates):
        scans, out, bundle = self._scans(luck, folder), folder / "out.nii", self.bundle
        if mutates:
            bundle = shutil.copytree(self.bundle, folder / "bundle")
            target = luck.choice([scans[0], *sorted(bundle.iterdir())])
            target.write_bytes(mutated(target.read_bytes(), luck))
            what += f", {target.name}"
            if target.name != "engine.json" and target not in scans:
                write_manifest(bundle)
        command = [*self.program, bundle, ",".join(map(str, scans)), out, "--threads", str(luck.integers(1, 4))]
        command += ["--disable-tta"] * int(luck.random() < 0.8)
        done = subprocess.run(
            [*command, "--step-size", "1"], capture_output=True, timeout=LONGEST_S, check=False, cwd=folder
        )
        said = done.stderr.decode(errors="replace")
        assert done.returncode in ((0, 1, 2) if mutates else (0,)), f"{what}: {said[-3000:]}"
        assert "Sanitizer" not in said, f"{what}: {said[-3000:]}"
        assert "runtime error" not in said, f"{what}: {said[-3000:]}"
        assert out.exists() == (done.returncode == 0), what
        return done.returncode

    def _scans(self, luck, folder):
        """Write a file for each channel, all of one random shape, type and spacing."""
        shape, dtype = luck.integers(1, 20, 3), np.dtype(TYPES[luck.integers(len(TYPES))])
        version, order, spacing = luck.integers(1, 3), "<>"[luck.integers(2)], luck.uniform(1.2, 3, 3)
        least = 0 if dtype.kind == "u" else -100
        scans = []
        for channel in range(self.channels):
            array = luck.integers(least, 100, shape).astype(dtype.newbyteorder(order))
            name = folder / f"scan_{channel}.nii{'.gz' if luck.random() < 0.3 else ''}"
            scans.append(write_nifti(name, array, version=version, order=order, spacing=spacing))
        return scans


if __name__ == "__main__":
    kind, program, count, seed, *precisions = [*sys.argv[1:], *(["0"] if len(sys.argv) == 4 else [])]
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(shlex.split(program), folder, int(seed), precisions)
        sys.stdout.write(f"{fuzz.run(int(count), mutates={'shapes': False, 'mutants': True}[kind])}\n")
