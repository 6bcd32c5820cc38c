"""Compares all classification heads on the same trained encoder, on held-out phantoms, with two controls.

    python -m nnturbo.benchmarks.heads --model FOLDER --dataset NAME --raw FOLDER --preprocessed FOLDER --plans NAME
        [--cases 300] [--seed S] [--iterations 400] [--json FILE]

The network is not changed; each head learns from the same patches, with its own AdamW: once from cases drawn alike,
with a loss that is weighted by class, and once from classes that are drawn equally often. The discriminant analysis is
fitted on pooled features of all training cases, its control on the same features with shuffled labels. They are
compared on phantoms of a seed by which nothing has been chosen: take another seed after anything was chosen by the
result.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnturbo.engine.model.classification import HEADS
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.model.heads import FocusPooling, Head, focus_map, make_head
from nnturbo.engine.model.multi_task_unet import MultiTaskUNet
from nnturbo.engine.model.network import build_network
from nnturbo.training.data.planning import nnunet_environment
from nnturbo.training.data.tables import read_subtype_results
from nnturbo.training.evaluation.metrics import bootstrap_macro_f1, classification_metrics
from nnturbo.training.phantoms.phantom import SMALL_SETTINGS, write_dataset
from nnturbo.training.pooled_classifier import ClassifiedScan, case_outputs, fit_discriminant, training_scans
from nnturbo.training.recipe import PRESETS
from torch import Tensor, nn

from .report import write_report

POOLED_STAGES = (0, 1, 2, 3)
RESAMPLES = 2000
EQUALLY = ", classes drawn equally often"


class AllHeads(Head):
    """Several heads as one; their outputs are concatenated."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor], focus: Tensor) -> Tensor:
        """Run every head."""
        return torch.cat([head(features, focus) for head in self.heads], 1)


def train_heads(
    network: MultiTaskUNet, heads: Sequence[Head], options: argparse.Namespace, *, equally: bool
) -> list[float]:
    """Train heads on a fixed network; give the mean loss of each over the last fifth of the steps.

    Args:
        network: Its encoder and decoder.
        heads: Learn, each by itself.
        options: Of the command.
        equally: Whether classes are drawn equally often, in place of weights in the loss.
    """
    from nnturbo.training.trainer import nnUNetTrainerMultiTask

    recipe = replace(PRESETS["balanced"], oversample_foreground=1.0)
    plans = json.loads((options.preprocessed / options.dataset / f"{options.plans}.json").read_bytes())
    dataset = json.loads((options.preprocessed / options.dataset / "dataset.json").read_bytes())
    plans |= {"nnturbo_recipe": recipe.describe(), "continue_training": False}
    with (
        tempfile.TemporaryDirectory() as results,
        nnunet_environment(raw=options.raw, preprocessed=options.preprocessed, results=Path(results)),
    ):
        trainer: Any = nnUNetTrainerMultiTask(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
        trainer.initialize()
        loader, _ = trainer.get_dataloaders()
        if equally:
            trainer.class_weights = torch.ones_like(trainer.class_weights)
            draw_classes_equally(loader.data_loader, trainer.subtypes)
        optimizers = [
            torch.optim.AdamW(head.parameters(), recipe.head_learning_rate, weight_decay=recipe.head_weight_decay)
            for head in heads
        ]
        losses = []
        for step in range(options.iterations):
            data, target, labels = trainer._to_device(next(loader))
            with torch.no_grad():
                features = network.encoder(data)
                focus = focus_map(network.decoder(features), network.scheme)
            of_heads = []
            for head, optimizer in zip(heads, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.head_learning_rate * (1 - step / options.iterations) ** 0.9
                optimizer.zero_grad(set_to_none=True)
                loss = trainer._class_loss(head(features, focus), labels, target)
                loss.backward()
                nn.utils.clip_grad_norm_(head.parameters(), recipe.head_gradient_clip)
                optimizer.step()
                of_heads.append(float(loss.detach()))
            losses.append(of_heads)
            if step % 50 == 0:
                print(f"step {step}: losses {[round(loss, 3) for loss in of_heads]}", flush=True)
    return np.mean(losses[-max(1, options.iterations // 5) :], axis=0).tolist()


def draw_classes_equally(loader: Any, subtypes: Mapping[str, int]) -> None:
    """Let nnU-Net's loader draw every class as often as any other."""
    labels = np.array([subtypes[case] for case in loader.indices])
    shares = 1 / np.bincount(labels)[labels]
    loader.sampling_probabilities = shares / shares.sum()


def held_out_scans(folder: Path) -> list[ClassifiedScan]:
    """Scans of the test split of a phantom data set that was written with its answers."""
    answers = read_subtype_results(folder / "test_answers" / "subtype_results.csv").subtypes
    return [
        ClassifiedScan(images=(folder / "test" / f"{name}_0000.nii.gz",), subtype=int(subtype))
        for name, subtype in answers.items()
    ]


def row(name: str, truth: Sequence[int], logits: np.ndarray, loss: float | None = None) -> dict[str, Any]:
    """Measure one head; the number of classes among its answers shows a collapse."""
    predicted = logits.argmax(1).tolist()
    metrics = classification_metrics(truth, predicted, logits.shape[1])
    interval = bootstrap_macro_f1(truth, predicted, resamples=RESAMPLES, seed=0)
    return {
        "head": name,
        "macro_f1": metrics.macro_f1,
        "interval": [interval.low, interval.high],
        "f1": metrics.f1,
        "balanced_accuracy": metrics.balanced_accuracy,
        "classes_answered": len(set(predicted)),
        "confusion": metrics.confusion,
        "training_loss": loss,
    }


def main() -> None:
    """Train, evaluate, print the table and keep it."""
    parser = argparse.ArgumentParser(description="classification heads")
    parser.add_argument("--model", type=Path, required=True)
    for name in ("raw", "preprocessed"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--plans", default="nnUNetCompactPlans")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=20261128)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112 - nnU-Net's own spelling
    torch.manual_seed(0)
    np.random.seed(0)
    start = time.perf_counter()
    model = read_model(options.model)
    network: Any = build_network(model.plan, model.weights[0])
    trained = network.head
    channels = tuple(network.encoder.output_channels)
    names = [f"{kind}{way}" for way in ("", EQUALLY) for kind in HEADS]
    heads = [make_head(replace(network.scheme, kind=kind), channels) for _ in range(2) for kind in HEADS]
    losses = [
        loss
        for equally, some in enumerate((heads[: len(HEADS)], heads[len(HEADS) :]))
        for loss in train_heads(network, some, options, equally=bool(equally))
    ]
    network.head = AllHeads([*(head.eval() for head in heads), trained, FocusPooling(POOLED_STAGES)])
    classes, device = network.scheme.num_classes, torch.device("cpu")
    outputs, truth = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(
            folder, counts={"test": options.cases}, seed=options.seed, settings=SMALL_SETTINGS, answers=True, workers=2
        )
        for split, scans in (
            ("train", training_scans(options.raw / options.dataset, options.preprocessed / options.dataset, 0)),
            ("held out", held_out_scans(Path(folder))),
        ):
            truth[split] = [scan.subtype for scan in scans]
            vectors = []
            for done, vector in enumerate(case_outputs(network, model.plan, scans, device), start=1):
                vectors.append(vector)
                if done % 40 == 0:
                    print(f"{split}: {done} of {len(scans)}, {time.perf_counter() - start:.0f} s", flush=True)
            outputs[split] = np.array(vectors)
    answers, pooled = outputs["held out"], (len(names) + 1) * classes
    rows = [
        row(name, truth["held out"], answers[:, index * classes : (index + 1) * classes], loss)
        for index, (name, loss) in enumerate(zip([*names, "as trained"], [*losses, None], strict=True))
    ]
    shuffled = np.random.default_rng(0).permutation(truth["train"])
    for name, labels in (("lda", np.array(truth["train"])), ("lda, shuffled labels", shuffled)):
        weight, bias = fit_discriminant(outputs["train"][:, pooled:], labels, classes)
        rows.append(row(name, truth["held out"], answers[:, pooled:] @ weight.numpy().T + bias.numpy()))
    guesses = np.eye(classes)[np.random.default_rng(1).integers(classes, size=len(answers))]
    rows.append(row("random answers", truth["held out"], guesses))
    for line in rows:
        low, high = line["interval"]
        print(f"{line['head']:40} macro-F1 {line['macro_f1']:.3f} ({low:.3f} to {high:.3f}), "
              f"{line['classes_answered']} classes answered")  # fmt: skip
    write_report(options.json, {
        "benchmark": "heads", "training_cases": len(truth["train"]), "held_out_cases": len(truth["held out"]),
        "seed": options.seed,
        "iterations": options.iterations, "pooled_stages": list(POOLED_STAGES), "rows": rows,
        "seconds": time.perf_counter() - start,
    })  # fmt: skip


if __name__ == "__main__":
    main()
