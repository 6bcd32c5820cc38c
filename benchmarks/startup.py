"""Times how long Python takes until a command or a program can begin.

    python -m nnturbo.benchmarks.startup [--rounds 7] [--json FILE]

Every line runs in fresh processes, in turn, so that a busy moment affects all of them.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from .report import python, run_measured, write_report

STOCK_IMPORT, OUR_IMPORT = "import nnU-Net's predictor", "from nnturbo.engine import Engine"
COMMANDS = {
    "import torch": python("-c", "import torch"),
    "import nnturbo.engine": python("-c", "import nnturbo.engine"),
    OUR_IMPORT: python("-c", OUR_IMPORT),
    "nnturbo --help": python("-m", "nnturbo.engine.cli", "--help"),
    STOCK_IMPORT: python("-c", "import nnunetv2.inference.predict_from_raw_data"),
}


def main() -> None:
    """Measure, print medians, and keep the samples."""
    parser = argparse.ArgumentParser(description="start-up times")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.rounds + 1):
        for name, command in COMMANDS.items():
            samples[name].append(run_measured(command).seconds)
    # The first round reads files from disk and is shown apart, in the JSON.
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}
    for name, seconds in medians.items():
        print(f"{seconds:6.2f} s  {name}")
    ratio = medians[OUR_IMPORT] / medians["import torch"]
    print(f"importing Engine takes {ratio:.2f} times as long as importing torch")
    write_report(
        options.json, {"benchmark": "startup", "median_s": medians, "samples_s": samples, "ratio_to_torch": ratio}
    )


if __name__ == "__main__":
    main()
