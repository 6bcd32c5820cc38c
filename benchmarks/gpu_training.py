"""The part of `gpu.py` about training: some epochs of the multi-task trainer on phantoms."""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnturbo.training.data.planners import PLANNERS
from nnturbo.training.data.prepare import plan_and_preprocess, prepare_dataset
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset
from nnturbo.training.recipe import Recipe
from nnturbo.training.train import train

from .gpu_device import Bench

COUNTS = {"train": 6, "validation": 3}
PROCESSES = min(8, os.cpu_count() or 1)
RECIPE = Recipe(
    epochs=6, iterations=20, validation_iterations=2, segmentation_epochs=1, detached_epochs=1, validate_every=0,
    save_every=100, seed=0,
)  # fmt: skip
"""Six short epochs: the first of the segmentation alone, the second with the head apart, the others with both."""


def training(bench: Bench) -> list[dict[str, Any]]:
    """Train nnU-Net's planned network on phantoms, as it is and compiled: seconds of a batch, memory, losses."""
    rows: list[dict[str, Any]] = []
    recipe = RECIPE if bench.on_gpu else replace(RECIPE, epochs=3, iterations=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "source", counts=COUNTS, settings=SMALL_SETTINGS, workers=PROCESSES)
        dataset = prepare_dataset(folder / "source", folder / "raw", dataset_id=901, dataset_name="Phantoms")
        planner = "resenc" if bench.on_gpu else PLANNERS[-1]
        plans = plan_and_preprocess(dataset.folder, folder / "preprocessed", planner=planner, processes=PROCESSES)
        for compiled in (False, True) if bench.on_gpu else (False,):
            os.environ["nnUNet_compile"] = "t" if compiled else "f"  # noqa: SIM112, nnU-Net's name
            if bench.on_gpu:
                torch.cuda.reset_peak_memory_stats(bench.device)
            model = train(
                dataset.folder.name, "3d_fullres", 0, recipe=recipe, plans_name=plans.stem, raw=folder / "raw",
                preprocessed=folder / "preprocessed", results=folder / f"results_{compiled}", device=bench.device.type,
            )  # fmt: skip
            rows.append({"compiled": compiled, **_told(bench, model, recipe)})
            bench.keep(rows)
            print("  ", rows[-1], flush=True)
    return rows


def _told(bench: Bench, model: Path, recipe: Recipe) -> dict[str, Any]:
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    history, logged = checkpoint["multi_task"]["history"], checkpoint["logging"]
    epochs = [
        ended - began
        for began, ended in zip(logged["epoch_start_timestamps"], logged["epoch_end_timestamps"], strict=True)
    ]
    return {
        "planner": checkpoint["init_args"]["plans"]["plans_name"],
        "epoch_s": epochs,
        "batch_s": statistics.median(epochs[1:]) / (recipe.iterations + recipe.validation_iterations),
        "train_loss": [line["train_loss"] for line in history],
        "class_loss": [line["class_loss"] for line in history],
        "peak_bytes": torch.cuda.max_memory_allocated(bench.device) if bench.on_gpu else None,
    }
