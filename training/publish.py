"""Copies a model folder for publication: all that inference needs, without the state of the training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ..engine.errors import OutputError
from ..engine.files import put_in_place, write_json, written_atomically
from ..engine.model.folder import read_model
from .history import CURVES_FILE, HISTORY_FILE

INFERENCE_KEYS = ("network_weights", "trainer_name", "inference_allowed_mirroring_axes", "pooled_classifier")
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
    if target.exists():
        raise OutputError(f"{target} exists: choose another folder, or remove it")
    model = read_model(source, folds=folds, checkpoint=checkpoint)
    aside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for fold in model.folds:
            of_fold = Path(f"fold_{fold}")
            (aside / of_fold).mkdir(parents=True)
            content = torch.load(source / of_fold / checkpoint, map_location="cpu", weights_only=False)
            kept = {key: content[key] for key in INFERENCE_KEYS if key in content}
            with written_atomically(aside / of_fold / checkpoint) as temporary:
                torch.save({**kept, "init_args": {"configuration": model.plan.configuration}}, temporary)
            for path in (source / of_fold / name for name in RECORDS):
                if path.is_file():
                    shutil.copyfile(path, aside / of_fold / path.name)
        write_json(aside / "plans.json", model.plans)
        write_json(aside / "dataset.json", model.dataset)
        put_in_place(aside, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target
