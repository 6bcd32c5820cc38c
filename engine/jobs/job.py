"""What a job is: which model, where to and how; and what its results are made of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundles.manifest import bundle_model, is_bundle, read_manifest
from ..engine import Engine
from ..ensemble import Ensemble
from ..errors import OutputError
from ..model.folder import read_chosen
from ..model.plans import DATASET, PLANS
from ..model.provenance import LabelSettings
from ..options import ModelChoice
from ..predictor import Predictor
from ..scans.image_header import DETACHED_ENDINGS
from ..scans.label_file import second_file
from ..scans.pictures import TIFF_ENDINGS
from ..scans.volume import files_of
from .cases import CaseFiles
from .dicom_seg import import_highdicom
from .made_of import FileStamp, MadeOf
from .records import SUBTYPES, RecordFolder


def load_predictor(models: Sequence[str | os.PathLike[str]], choice: ModelChoice, device: str) -> Predictor[Any, Any]:
    """Load one model, or several whose probabilities are averaged."""
    arguments = {**choice.arguments(), "device": device}
    return Engine.load(models[0], **arguments) if len(models) == 1 else Ensemble.load(models, **arguments)


def file_ending_of(model: str | os.PathLike[str], choice: ModelChoice) -> str:
    """Find out what a model's scans end in, without making it ready to run."""
    if is_bundle(model):
        return bundle_model(read_manifest(Path(model)), Path(model)).plan.file_ending
    return read_chosen(model, choice).plan.file_ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to do with the cases.

    Args:
        output: Folder for results; made if it is not there.
        save_probabilities: Write `.npz` and `.pkl` beside each segmentation, as nnU-Net does.
        class_probabilities: Write the probabilities of all classes into the table of classes too.
        dicom_seg: Write a DICOM Segmentation object `.dcm` beside each; scans must be DICOM folders.
        skip_existing: Leave the labels alone that are there, as nnU-Net does: those that are complete, and those that
            this job would not make, such as corrected ones.
        redo_outdated: With it, make again what nnturbo itself made with another model, other settings or another
            version of the scan.
        previous_stage: Folder with the labels of a cascade's previous stage.
        readers: How many scans are read at once, ahead of the network; 0: each when it is its turn.
        writers: How many results are written at once, behind it; 0: each before the next one's turn.
    """

    output: Path
    save_probabilities: bool = False
    class_probabilities: bool = False
    dicom_seg: bool = False
    skip_existing: bool = False
    redo_outdated: bool = False
    previous_stage: Path | None = None
    readers: int = 1
    writers: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("readers", "writers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"the output must be a folder for the segmentations, {self.output} is a file")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a job has to know of its model, wherever that is loaded.

    Args:
        models: What decides the labels of each model.
        file_ending: Of scans and segmentations.
        reader: nnU-Net's class that reads scans and labels.
        class_names: Classes of a case, or None.
        previous_stage: Of a cascade, or None.
        plans: nnU-Net's.
        dataset: nnU-Net's.
    """

    models: tuple[LabelSettings, ...]
    file_ending: str
    reader: str
    class_names: tuple[str, ...] | None
    previous_stage: str | None
    plans: Mapping[str, Any]
    dataset: Mapping[str, Any]

    @classmethod
    def of(cls, engine: Predictor) -> ModelInfo:
        """Ask a model."""
        model = engine.model
        return cls(
            models=tuple(each.settings for each in engine.provenance),
            file_ending=model.plan.file_ending,
            reader=model.plan.reader,
            class_names=engine.class_names,
            previous_stage=model.plan.previous_stage,
            plans=model.plans,
            dataset=model.dataset,
        )

    def results(self, job: Job, name: str) -> list[Path]:
        """Every file that a finished case has, in the order in which they appear."""
        extra = [*([".npz", ".pkl"] if job.save_probabilities else []), *([".dcm"] if job.dicom_seg else [])]
        segmentation = job.output / f"{name}{self.file_ending}"
        beside = second_file(segmentation, self.reader)
        return [*(job.output / f"{name}{ending}" for ending in extra), *([beside] if beside else []), segmentation]

    def made_of(self, job: Job, case: CaseFiles) -> MadeOf:
        """What a case's results are made of: the models, and every file that is read."""
        before = self.labels_before(job, case.name)
        inputs = [*case.images, *([before] if before else [])]
        return MadeOf(models=self.models, inputs={str(path.absolute()): self._stamps(path) for path in inputs})

    def _stamps(self, path: Path) -> tuple[FileStamp, ...] | None:
        """Tell the files of a scan from others under the same names; None where there is nothing."""
        try:
            return tuple(FileStamp.of(file) for file in sorted(files_of(path, self.reader)))
        except OSError:
            return None

    def record_folder(self, job: Job) -> RecordFolder:
        """Open the records in the output folder."""
        return RecordFolder(
            output=job.output,
            file_ending=self.file_ending,
            class_names=self.class_names,
            class_probabilities=job.class_probabilities,
        )

    def labels_before(self, job: Job, name: str) -> Path | None:
        """Name the file with a case's labels of a cascade's previous stage."""
        if self.previous_stage is None or job.previous_stage is None:
            return None
        return job.previous_stage / f"{name}{self.file_ending}"


def check_overwriting(info: ModelInfo, cases: Sequence[CaseFiles], job: Job) -> None:
    """Refuse to write where something lies that is to be read, or that somebody else has made.

    Raises:
        ValueError: Where a result would replace a file that is read, or come into a folder of slices.
        OutputError: Where the output folder has nnU-Net's files of another model, or tables, and no records.
    """
    inputs: dict[tuple[int, int], Path] = {}
    for case in cases:
        for path in (*case.images, info.labels_before(job, case.name)):
            if path is None:
                continue
            of_several = path.name.lower().endswith((*DETACHED_ENDINGS, *TIFF_ENDINGS))
            for file in files_of(path, info.reader) if of_several else (path,):
                if (identity := _identity(file)) is not None:
                    inputs[identity] = path
    for folder in (job.output, *job.output.absolute().parents):
        if (within := inputs.get(_identity(folder) or (0, 0))) is not None:
            raise ValueError(f"the output folder {job.output} lies in {within}, which is an input; choose another one")
    there = set(os.listdir(job.output)) if job.output.is_dir() else set()
    for case in cases if there else ():
        for result in info.results(job, case.name):
            if result.name in there and _identity(result) in inputs:
                raise ValueError(f"the result {result} would replace a file that is read; choose another output folder")
    if info.record_folder(job).has_own():
        return
    for name, content in {PLANS: info.plans, DATASET: info.dataset, SUBTYPES: None}.items():
        path = job.output / name
        try:
            if json.loads(path.read_bytes()) == content:
                continue
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError):
            pass
        raise OutputError(
            f"{path} is not what this job would write, and would be replaced; choose another output folder"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Tell files and folders apart, whatever they are called; None where there is nothing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def check_dicom(cases: Sequence[CaseFiles]) -> None:
    """Refuse what a DICOM segmentation cannot be made of, before the work is done."""
    import_highdicom()
    if files := [image for case in cases for image in case.images if not image.is_dir()]:
        raise ValueError(
            "a DICOM segmentation refers to the slices it was made of, so every scan must be a folder of them; "
            f"{files[0]} is not one"
        )
