"""Copies a model folder for publication: all that inference needs, without the state of the training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ..engine.files import new_folder, write_json
from ..engine.model.folder import read_model
from ..engine.model.plans import DATASET, PLANS
from .history import CURVES_FILE, HISTORY_FILE
from .trainer_state import FITTED

INFERENCE_KEYS = ("network_weights", "trainer_name", "inference_allowed_mirroring_axes", *FITTED)
RECORDS = (HISTORY_FILE, CURVES_FILE)
"""Files of a training that are copied too."""


def publish_model(
    model_folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
) -> Path:
    """Copy a model without optimizer states, random states and the paths of the machine it was trained on.

    nnU-Net's predictor and the engine load the copy as they load the original.

    Args:
        model_folder: Folder of a trained model.
        target: The new folder; it must not exist.
        folds: Folds to copy; by default all that have the checkpoint.
        checkpoint: File name of the checkpoint.

    Returns:
        The new folder.

    Raises:
        ModelError: Where the model cannot be read.
        OutputError: Where the target exists, or cannot be written.
    """
    source, target = Path(model_folder), Path(target)
    model = read_model(source, folds=folds, checkpoint=checkpoint)
    with new_folder(target) as folder:
        for fold in model.folds:
            of_fold = Path(f"fold_{fold}")
            (folder / of_fold).mkdir()
            content = torch.load(source / of_fold / checkpoint, map_location="cpu", weights_only=False)
            kept = {key: content[key] for key in INFERENCE_KEYS if key in content}
            torch.save(
                {**kept, "init_args": {"configuration": model.plan.configuration}}, folder / of_fold / checkpoint
            )
            for path in (source / of_fold / name for name in RECORDS):
                if path.is_file():
                    shutil.copyfile(path, folder / of_fold / path.name)
        write_json(folder / PLANS, model.plans)
        write_json(folder / DATASET, model.dataset)
    return target
