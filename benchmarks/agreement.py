r"""Compares the labels of every backend with fp32 torch, on generated phantoms or given scans, without mirroring.

    python -m nnturbo.benchmarks.agreement --model FOLDER [--cases 12 | --scans FILE ...] [--ways openvino:fp32 ...] \
        [--calibration 4] [--json FILE]

int8 is calibrated on phantoms of another seed, or on the given scans.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from nnturbo.engine import Engine, Prediction, build
from nnturbo.engine.backends.choose import backends
from nnturbo.engine.errors import BackendUnavailable, BundleError
from nnturbo.engine.export.agreement import measure_agreement
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset

from .report import write_report

CPU = torch.device("cpu")
SEED, CALIBRATION_SEED = 20261123, 11
"""Seeds of phantoms on which no model was trained."""


class Remembered(Engine):
    """An engine that predicts each scan once."""

    def predict(self, image: Any, **arguments: Any) -> Prediction:
        """Return the stored prediction, or predict."""
        known: dict[str, Prediction] = self.__dict__.setdefault("known", {})
        if str(image) not in known:
            known[str(image)] = super().predict(image, **arguments)
        return known[str(image)]


def built(model: Path, out: Path, backend: str, precision: str, **calibration: Any) -> Path:
    """Build as `nnturbo build` does; if labels agree too little, build without its check."""
    given = {"backend": backend, "precision": precision, "device": "cpu", **calibration}
    try:
        return build(model, out, **given)
    except BundleError as error:
        print(error)
        return build(model, out, floor=0, **given)


def main() -> None:
    """Measure, print, and keep the counts."""
    known = [f"{name}:{precision}" for name in backends() for precision in ("fp32", "bf16", "int16", "int8")]
    parser = argparse.ArgumentParser(description="agreement")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--scans", type=Path, nargs="+", help="in place of phantoms")
    parser.add_argument("--ways", nargs="+", choices=known, default=known)
    parser.add_argument("--calibration", type=int, default=4, help="phantoms to calibrate int8 with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    reference = Remembered.load(options.model, backend="torch", precision="fp32", device="cpu", mirror=False)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scans, calibration, what = options.scans, options.scans, "given scans"
        if scans is None:
            scans, calibration = (
                [case.image for case in write_dataset(folder / str(seed), counts={"test": count}, seed=seed,
                                                      settings=SMALL_SETTINGS)]
                for seed, count in ((SEED, options.cases), (CALIBRATION_SEED, options.calibration))
            )  # fmt: skip
            what = "phantoms"
        for way in options.ways:
            backend, precision = way.split(":")
            if (reason := backends()[backend].unavailable(CPU, precision)) is not None:
                print(f"{way}: {reason}")
                continue
            try:
                given = {} if precision == "fp32" else {"calibration": calibration, "calibration_name": what}
                bundle = built(options.model, folder / way.replace(":", "-"), backend, precision, **given)
            except BackendUnavailable as error:
                print(f"{way}: {error}")
                continue
            agreement = measure_agreement(reference, Engine.load(bundle, mirror=False), scans, what)
            rows.append({"way": way, **asdict(agreement), "lowest_dice": agreement.lowest_dice})
            print(f"{way}: {agreement}", flush=True)
            write_report(options.json, {"benchmark": "agreement", "model": options.model.name, "rows": rows})


if __name__ == "__main__":
    main()
