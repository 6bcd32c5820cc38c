"""Checks in a minute whether nnturbo became much slower, by stored ratios against nnU-Net.

    python -m nnturbo.benchmarks.guard [--keep]

For CI: it fails only if a ratio is below half of the one in `results/guard.json`. Most ratios are of CPU time, which
other processes change little. `--keep` stores the new ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nnturbo.engine.bundles.manifest import source_hashes
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.options import DEFAULT_CHECKPOINT

from .backends import build, eager, load, tile_of
from .report import run_measured, write_report
from .stages import measure, timed
from .startup import COMMANDS, OUR_IMPORT, STOCK_IMPORT
from .task_models import DEMO_MODEL

KEPT = Path(__file__).with_name("results") / "guard.json"
ROUNDS = 5


def stages() -> float:
    """Scan to network and logits to labels."""
    return measure((60, 192, 192), (2.5, 0.78, 0.78), 3, ROUNDS, time.process_time)["ratio"]


def network() -> float:
    """One tile of the demo model in OpenVINO."""
    return _network("openvino", time.process_time)


def kernels() -> float:
    """The same with nnturbo's kernels, in wall time, so that lost threads show too."""
    return _network("native", time.perf_counter)


def _network(backend: str, clock: Callable[[], float]) -> float:
    model = read_model(DEMO_MODEL, folds=["0"])
    tile = tile_of(model)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        build(model, source_hashes(model, DEFAULT_CHECKPOINT), backend, "fp32", tile, bundle)
        ours, stock = load(bundle), eager(model)
        ours(tile), stock(tile)
        pairs = [(timed(lambda: stock(tile), clock)[0], timed(lambda: ours(tile), clock)[0]) for _ in range(ROUNDS)]
    return statistics.median(stock for stock, _ in pairs) / statistics.median(ours for _, ours in pairs)


def startup() -> float:
    """Importing the predictor."""
    pairs = [[run_measured(COMMANDS[what]).cpu_seconds for what in (STOCK_IMPORT, OUR_IMPORT)] for _ in range(3)]
    return min(stock for stock, _ in pairs) / min(ours for _, ours in pairs)


def too_slow(ratios: dict[str, float], kept: dict[str, float]) -> list[str]:
    """Name the ratios that are below half of the stored ones."""
    return [
        f"{name}: {ratios[name]:.2f} times nnU-Net's speed, kept are {kept[name]:.2f}"
        for name in kept
        if ratios[name] < kept[name] / 2
    ]


def main() -> int:
    """Measure and compare; return 1 if a ratio is too low."""
    parser = argparse.ArgumentParser(description="large regressions")
    parser.add_argument("--keep", action="store_true", help="store the ratios")
    options = parser.parse_args()
    ratios = {}
    for part in (stages, network, kernels, startup):
        ratios[part.__name__] = part()
        print(f"{part.__name__:8} {ratios[part.__name__]:6.2f} times nnU-Net's speed", flush=True)
    if options.keep:
        write_report(KEPT, {"benchmark": "guard", "ratios": ratios})
        return 0
    slow = too_slow(ratios, json.loads(KEPT.read_bytes())["ratios"])
    print("\n".join(slow) or "nothing became much slower")
    return int(bool(slow))


if __name__ == "__main__":
    raise SystemExit(main())
