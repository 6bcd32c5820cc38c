"""Mutated bundles and scans for a program that was built with sanitizers: each must end with an error, or be fine.

    python -m tests.kernels.libnnturbo.fuzz PROGRAM BUNDLE SCAN COUNT [SEED]

The hashes of mutated files are written into the manifest, so that the checks behind them are reached.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.cpp.factory import write_manifest

LONGEST_S = 120
NUMBERS = (b"0", b"-1", b"1", b"7", b"65536", b"2147483648", b"99999999999999999999", b"1e308", b"null", b'"x"', b"[]")


def mutated(content, luck):
    """Change, drop or repeat some bytes; in JSON also whole numbers."""
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
            _replace_number(content, luck)
        content = content or bytearray(b"\0")
    return bytes(content)


def _replace_number(content, luck):
    digits = [i for i, byte in enumerate(content[:200_000]) if chr(byte).isdigit()]
    if digits:
        start = end = int(luck.choice(digits))
        while end < len(content) and chr(content[end]).isdigit():
            end += 1
        content[start:end] = NUMBERS[int(luck.integers(len(NUMBERS)))]


def fuzz(program, bundle, scan, count, seed=0):
    """Run so many mutants; returns how often the program ended with each status.

    Raises:
        AssertionError: Where it crashed; the text says what the sanitizer said.
    """
    statuses = {}
    for index in range(count):
        luck = np.random.default_rng([seed, index])
        with tempfile.TemporaryDirectory() as folder:
            own, own_scan, out = Path(folder, "bundle"), Path(folder, scan.name), Path(folder, "out.nii")
            shutil.copytree(bundle, own)
            shutil.copy(scan, own_scan)
            target = luck.choice([own_scan, *sorted(own.iterdir())])
            target.write_bytes(mutated(target.read_bytes(), luck))
            if target.name != "engine.json" and target != own_scan:
                write_manifest(own)
            command = [program, own, own_scan, out, "--disable-tta", "--step-size", "1", "--threads", "2"]
            done = subprocess.run(command, capture_output=True, timeout=LONGEST_S, check=False)
            said = done.stderr.decode(errors="replace")
            assert done.returncode in (0, 1, 2), f"mutant {index} of seed {seed}, {target.name}: {said[-3000:]}"
            assert "Sanitizer" not in said, f"mutant {index} of seed {seed}, {target.name}: {said[-3000:]}"
            assert "runtime error" not in said, f"mutant {index} of seed {seed}, {target.name}: {said[-3000:]}"
            assert out.exists() == (done.returncode == 0)
        statuses[done.returncode] = statuses.get(done.returncode, 0) + 1
        if index % 1000 == 999:
            sys.stdout.write(f"{index + 1} mutants: {statuses}\n")
            sys.stdout.flush()
    return statuses


if __name__ == "__main__":
    program, bundle, scan, count, *seed = sys.argv[1:]
    sys.stdout.write(f"{fuzz(program, Path(bundle), Path(scan), int(count), *map(int, seed))}\n")
