"""A folder of scans: find the cases, predict each, write results; one bad case does not stop the others."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .classification import Classification
from .engine import Engine
from .ensemble import Ensemble
from .errors import EngineError, OutputError, VolumeError
from .files import write_json, written_atomically
from .prediction import Prediction

logger = logging.getLogger(__name__)

Predictor = Engine | Ensemble
"""What a run of many cases can predict with."""

CHANNEL = re.compile(r"_\d{4}$")
"""nnU-Net's channel number at the end of a file's stem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFiles:
    """One scan to predict: its name, which results are called by, and what to read."""

    name: str
    images: tuple[Path, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to do with the cases.

    Args:
        output: Folder for results; made if it is not there.
        save_probabilities: Write `.npz` and `.pkl` beside each segmentation, as nnU-Net does.
        skip_existing: Leave cases alone whose results are there.
        previous_stage: Folder with the labels of a cascade's previous stage.
        records: File in the output folder that says how each case went; runs at the same time need different ones.
        subtypes: Table in the output folder with the class of each case, for models with a classification head; as
            `records`, one of its own for runs at the same time.
    """

    output: Path
    save_probabilities: bool = False
    skip_existing: bool = False
    previous_stage: Path | None = None
    records: str = "predictions.json"
    subtypes: str = "subtype_results.csv"


@dataclass(slots=True)
class Outcome:
    """How a run went."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def find_cases(source: Path, file_ending: str) -> list[CaseFiles]:
    """List the cases in a folder of `<name>_0000<ending>` files, or make one of a single file or DICOM folder.

    Raises:
        VolumeError: Where there is nothing to predict.
    """
    if not source.exists():
        raise VolumeError(f"{source} does not exist; -i takes a folder of scans, one file, or a folder of DICOM slices")
    if source.is_file():
        stem = _without_ending(source.name, file_ending)
        return [CaseFiles(name=CHANNEL.sub("", stem), images=(source,))]
    files = sorted(path for path in source.iterdir() if path.name.endswith(file_ending) and path.is_file())
    if not files:
        return [CaseFiles(name=source.resolve().name, images=(source,))]
    cases: dict[str, list[Path]] = {}
    unnumbered = []
    for path in files:
        stem = path.name.removesuffix(file_ending)
        if CHANNEL.search(stem):
            cases.setdefault(CHANNEL.sub("", stem), []).append(path)
        elif not path.name.startswith("."):
            unnumbered.append(path.name)
    if unnumbered:
        raise VolumeError(
            f"every file in {source} must end in its channel's number, such as scan_0000{file_ending}; "
            f"{len(unnumbered)} do not, such as {unnumbered[0]}"
        )
    return [
        # Channels are 0, 1, 2, ...; where one is left out, reading says that its file is missing.
        CaseFiles(name=name, images=tuple(source / f"{name}_{i:04d}{file_ending}" for i in range(len(paths))))
        for name, paths in cases.items()
    ]


def _without_ending(name: str, file_ending: str) -> str:
    for ending in (file_ending, ".nii.gz", ".gz"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return Path(name).stem


def predict_cases(
    engine: Predictor,
    cases: Sequence[CaseFiles],
    job: Job,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Outcome:
    """Predict cases in order and write what comes out, with a record in `predictions.json`.

    Args:
        engine: The model, or several.
        cases: What to predict.
        job: Where to and how.
        progress: Called with (case, tiles done, tiles in all).

    Raises:
        OutputError: Where the output folder cannot be used.
        ValueError: Where two cases have the same name.
    """
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"every case must have its own output name; {', '.join(twice)} come more than once")
    _check_overwriting(engine, cases, job)
    _prepare_output(engine, job)
    records = _read_records(job.output / job.records)
    outcome = Outcome()
    if job.skip_existing:
        outcome.skipped = [name for name in names if _is_complete(engine, job, name, records)]
    _write_subtypes(engine, job, records)
    pending = [case for case in cases if case.name not in outcome.skipped]
    predictions = engine.predict_many(
        [case.images if len(case.images) != 1 else case.images[0] for case in pending],
        previous_stages=[_previous(engine, job, case.name) for case in pending],
        save_probabilities=job.save_probabilities,
        progress=None if progress is None else (lambda index, done, total: progress(pending[index].name, done, total)),
    )
    with contextlib.closing(predictions):
        for index, (case, prediction) in enumerate(zip(pending, predictions, strict=True)):
            try:
                _keep(engine, job, case, prediction, records, outcome)
            except OutputError as error:
                # What stops one result from being written stops the next one too.
                rest = "not tried, because results cannot be written"
                later = ((other.name, rest) for other in pending[index + 1 :])
                for name, reason in ((case.name, str(error)), *later):
                    outcome.failed[name] = reason
                    records[name] = {"name": name, "status": "failed", "error": reason}
                with contextlib.suppress(OutputError):  # on a full disk the records may not fit either
                    _write_records(engine, job, records)
                return outcome
            _write_records(engine, job, records)
    return outcome


def _keep(
    engine: Predictor,
    job: Job,
    case: CaseFiles,
    prediction: Prediction | EngineError,
    records: dict[str, Any],
    outcome: Outcome,
) -> None:
    """Write one result, and say how it went."""
    if isinstance(prediction, EngineError):
        reason = str(prediction)
        logger.info("%s failed: %s", case.name, reason)
        outcome.failed[case.name] = reason
        records[case.name] = {"name": case.name, "status": "failed", "error": reason, **_inputs(case)}
        return
    records[case.name] = {"name": case.name, "status": "done", **_inputs(case), **_record(prediction)}
    _write(engine, job, case.name, prediction)
    outcome.done.append(case.name)
    logger.info("%s: %s", case.name, ", ".join(f"{k} {v:.0f} ms" for k, v in prediction.timings.items()))


def _is_complete(engine: Predictor, job: Job, name: str, records: Mapping[str, Any]) -> bool:
    """Whether an earlier run has done a case, with its class where the model gives one."""
    if not all(path.is_file() for path in _results(engine, job, name)):
        return False
    return engine.class_names is None or _subtype(engine.class_names, records.get(name, {})) is not None


def _check_overwriting(engine: Predictor, cases: Sequence[CaseFiles], job: Job) -> None:
    """Refuse to write a result where something lies that is to be read."""
    inputs = {image.resolve() for case in cases for image in case.images}
    inputs |= {path.resolve() for case in cases if (path := _previous(engine, job, case.name))}
    for case in cases:
        for result in _results(engine, job, case.name):
            if result.resolve() in inputs:
                raise ValueError(f"the result {result} would replace a file that is read; choose another output folder")


def _write_records(engine: Predictor, job: Job, records: Mapping[str, Any]) -> None:
    write_json(job.output / job.records, {"schema": 1, "cases": list(records.values())})
    _write_subtypes(engine, job, records)


def _write_subtypes(engine: Predictor, job: Job, records: Mapping[str, Any]) -> None:
    """Write the class of every case that is done, those of earlier runs among them."""
    if engine.class_names is None:
        return
    ending = engine.model.plan.file_ending
    rows = {f"{name}{ending}": _subtype(engine.class_names, record) for name, record in records.items()}
    with written_atomically(job.output / job.subtypes) as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("Names", "Subtype"))
        table.writerows(sorted((name, subtype) for name, subtype in rows.items() if subtype is not None))


def _subtype(class_names: Sequence[str], record: Mapping[str, Any]) -> str | None:
    """Take the class from a record: its name where that is a number, else its index.

    They differ for a data set that lacks the class 0. None where the record has no class, or one of other classes than
    the model's.
    """
    match record:
        case {"status": "done", "classification": {"label": int(label), "probabilities": {**probabilities}}}:
            if list(probabilities) == list(class_names) and 0 <= label < len(class_names):
                return class_names[label] if class_names[label].isdecimal() else str(label)
    return None


def _prepare_output(engine: Predictor, job: Job) -> None:
    """Make the folder and put the model's JSON files there, where nnU-Net's ensembling and post-processing look."""
    try:
        job.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the output folder {job.output} cannot be made: {error.strerror or error}") from error
    write_json(job.output / "plans.json", engine.model.plans)
    write_json(job.output / "dataset.json", engine.model.dataset)


def _results(engine: Predictor, job: Job, name: str) -> list[Path]:
    """Every file that a finished case has."""
    endings = [engine.model.plan.file_ending, *([".npz", ".pkl"] if job.save_probabilities else [])]
    return [job.output / f"{name}{ending}" for ending in endings]


def _previous(engine: Predictor, job: Job, name: str) -> Path | None:
    if engine.model.plan.previous_stage is None or job.previous_stage is None:
        return None
    return job.previous_stage / f"{name}{engine.model.plan.file_ending}"


def _write(engine: Predictor, job: Job, name: str, prediction: Prediction) -> None:
    segmentation, *extra = _results(engine, job, name)
    if extra:
        npz, pkl = extra
        with written_atomically(npz) as temporary:
            np.savez_compressed(temporary, probabilities=prediction.probabilities)  # type: ignore[arg-type]
        with written_atomically(pkl) as temporary:
            temporary.write_bytes(pickle.dumps(dict(prediction.properties)))
    # Last, so that a segmentation under its name means that the case is complete.
    prediction.save(segmentation)


def _inputs(case: CaseFiles) -> dict[str, Any]:
    return {"images": [os.fspath(path) for path in case.images]}


def _record(prediction: Prediction) -> dict[str, Any]:
    answer = prediction.classification
    of_case = {} if answer is None else {"classification": _describe(answer)}
    return {
        **of_case,
        "volumes_ml": prediction.volumes_ml,
        "timings_ms": {stage: round(ms, 3) for stage, ms in prediction.timings.items()},
        "warnings": list(prediction.warnings),
        "provenance": dict(prediction.provenance),
    }


def _describe(answer: Classification) -> dict[str, Any]:
    return {
        "label": answer.label,
        "name": answer.name,
        "probabilities": dict(zip(answer.class_names, answer.probabilities, strict=True)),
        "logits": list(answer.logits),
    }


def _read_records(path: Path) -> dict[str, Any]:
    """Read the records of an earlier run into the same folder, so that they are kept."""
    if not path.is_file():
        return {}
    try:
        return {record["name"]: record for record in json.loads(path.read_text())["cases"]}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} must be what nnturbo wrote there; it cannot be read ({error}). Move it away"
        ) from error
