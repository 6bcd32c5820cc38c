"""Writes what a predictor of nnU-Net's writes: labels, and probabilities with properties beside them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import Engine
from ..errors import OutputError
from ..files import put_in_place, staging_folder
from ..pipeline.prediction import answer
from ..pipeline.steps import Segmented
from .cases import AnyCase, FileCase

NIFTI_ENDINGS = (".nii.gz", ".nii")


def write_results(case: AnyCase, segmented: Segmented, engine: Engine, plans_manager: Any, ending: str) -> None:
    """Write a case's results; nothing has its name before all of them are complete.

    Args:
        case: Its `output` is the path of the results without ending.
        segmented: What came out.
        engine: What predicted.
        plans_manager: nnU-Net's, whose writer writes labels of arrays.
        ending: Of label files.

    Raises:
        OutputError: Where they cannot be written.
    """
    assert case.output is not None  # else there is nothing to write
    labels = Path(label_file(case.output, ending, engine.model.plan.reader))
    labels.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(labels) as folder:
        staged = folder / labels.name
        properties = segmented.prepared.properties if isinstance(case, FileCase) else case.properties
        if isinstance(case, FileCase):
            answer(segmented, engine.model.plan, engine.provenance).save(staged)
        else:
            plans_manager.image_reader_writer_class().write_seg(segmented.segmentation(), str(staged), properties)
        if segmented.probabilities is not None:
            stem = folder / Path(case.output).name
            np.savez_compressed(f"{stem}.npz", probabilities=segmented.probabilities)
            Path(f"{stem}.pkl").write_bytes(pickle.dumps(dict(properties or {})))
        try:
            for path in sorted(folder.iterdir(), key=lambda path: path.name == labels.name):
                put_in_place(path, labels.parent / path.name)
        except OSError as error:
            raise OutputError.of(labels, error) from error


def label_file(output: str, ending: str, reader: str) -> str:
    """Name the label file of a case as nnU-Net's writer does.

    Args:
        output: Path without ending; some programs, such as HD-BET, give one that has it.
        ending: Of label files.
        reader: nnU-Net's class, which writes too.

    Note:
        ITK's NIfTI library takes the ending off, and puts none on what still has one.
    """
    had = next((each for each in NIFTI_ENDINGS if output.lower().endswith(each)), None)
    if had is None or ending.lower() not in NIFTI_ENDINGS or not reader.startswith("SimpleITKIO"):
        return output + ending
    return output if had.endswith(".gz") else output + ending[len(".nii") :]
