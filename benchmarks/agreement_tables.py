"""The tables of labels and classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnturbo.training.choose import Candidate, Proposal, candidate_table
from nnturbo.training.evaluation.metrics import Interval

from .figures import RESULTS
from .tables import load, markdown, model_and_scans


def parity() -> str:
    """Numbers of voxels that differ from nnU-Net, over all tasks."""
    rows = load("parity")["rows"]
    tasks = [row for row in rows if row["differ_from_fp32_stock"] is not None]
    real = [row for row in rows if row["differ_from_fp32_stock"] is None]

    def total(key: str, over: list[dict[str, Any]]) -> str:
        count, voxels = sum(row[key] for row in over), sum(row["voxels"] for row in over)
        return f"{count} of {voxels} ({count / voxels:.0e})"

    kinds = len({row["name"].rpartition("-")[0] for row in tasks})
    table = [[f"{row['name']}: a trained model on a real CT, against the labels that nnU-Net wrote",
              total("differ_from_stock", [row]), "-"] for row in real]  # fmt: skip
    table.append(
        [
            f"{kinds} kinds of model on {len(tasks)} scans",
            total("differ_from_stock", tasks),
            total("differ_from_fp32_stock", tasks),
        ]
    )
    header = ["models and scans", "voxels with another label than nnU-Net", "than nnU-Net with fp32 sums"]
    return markdown(header, table)


def parity_rows() -> str:
    """The same for every kind of model and scan."""
    rows = []
    for row in load("parity")["rows"]:
        counts = (row["differ_from_stock"], row["differ_from_fp32_stock"], row["stock_differs_from_fp32_stock"])
        rows.append([row["name"], str(row["voxels"]), *("-" if count is None else str(count) for count in counts)])
    header = ["model kind and scan", "voxels", "other labels than nnU-Net", "other labels than nnU-Net with fp32 sums",
              "nnU-Net: other labels than with fp32 sums"]  # fmt: skip
    return markdown(header, rows)


def rounding() -> str:
    """Difference of each backend's float32 from float64 on deep networks."""
    rows = [
        [row["network"], row["tile"], row["backend"], f"{row['error']:.0e}", f"{row['labels']} of {row['voxels']}",
         f"{row['margin']:.0e}" if row["labels"] else "-"]
        for row in load("rounding")["rows"]
    ]  # fmt: skip
    header = ["network", "tile", "backend", "greatest error of a logit", "other labels", "greatest margin among them"]
    return markdown(header, rows)


def heads() -> str:
    """Classification heads on one encoder, and their controls."""
    result = load("heads")
    rows = [
        [
            row["head"],
            f"{row['macro_f1']:.3f}",
            "{:.3f} to {:.3f}".format(*row["interval"]),
            ", ".join("-" if value is None else f"{value:.2f}" for value in row["f1"]),
            f"{row['classes_answered']} of 3",
        ]
        for row in result["rows"]
    ]
    return markdown(["head", "macro-F1", "95 % interval", "F1 by subtype", "subtypes ever answered"], rows)


def demo() -> str:
    """The demo model on held-out phantoms."""
    result = load("demo_model")
    return markdown(
        [f"measure, over {result['cases']} phantoms", "value", "95 % interval"],
        [
            [name, f"{of['value']:.3f}", f"{of['low']:.3f} to {of['high']:.3f}"]
            for name, of in result["measures"].items()
        ],
    )


def class_ways() -> str:
    """Ways to answer for the class by the demo model's network."""
    result, rows = load("demo_model"), []
    for row in result["rows"]:
        of = row["difference"]
        difference = "-" if row["way"] == of["from"] else f"{of['value']:+.3f} ({of['low']:+.3f} to {of['high']:+.3f})"
        interval = "{:.3f} to {:.3f}".format(*row["interval"])
        rows.append([row["way"], f"{row['macro_f1']:.3f}", interval, difference])
    header = [f"what answers, over {result['cases']} phantoms", "macro-F1", "95 % interval", "more than the demo model"]
    return markdown(header, rows)


def recipes() -> str:
    """Recipes that go on from one start."""

    def value(of: dict[str, Any]) -> str:
        return f"{of['value']:.3f} ({of['low']:.3f} to {of['high']:.3f})"

    return _recipes("", value)


def recipe_differences() -> str:
    """By how much each is better than one of them, over the same phantoms."""
    reference = load("recipes")["reference"]

    def more(of: dict[str, Any]) -> str:
        difference = of["difference"]
        return f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"

    return _recipes(f", more than {reference}", more, without=reference)


def _recipes(what: str, cell: Callable[[dict[str, Any]], str], without: str | None = None) -> str:
    result = load("recipes")
    rows = [[row["way"], *map(cell, row["measures"].values())] for row in result["rows"] if row["way"] != without]
    header = f"{result['steps']} batches, {result['cases']} phantoms{what}"
    return markdown([header, *result["rows"][0]["measures"]], rows)


def weight_average() -> str:
    """The average of a training's weights against the weights."""
    rows = []
    for row in load("weight_average")["rows"]:
        for name, of in row["average"].items():
            pair = [
                f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
                for value in (row["weights"][name], of)
            ]
            more = "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**of["difference"])
            rows.append([row["when"], name, *pair, more])
    return markdown(
        ["after", "measure", "weights", "average of the weights", "difference over the same phantoms"], rows
    )


def choice() -> str:
    """What `nnturbo choose` printed about four presets."""

    def value(stored: Any) -> Any:
        if isinstance(stored, dict):
            return Interval(**stored)
        return tuple(stored) if isinstance(stored, list) else stored

    def candidate(stored: dict[str, Any]) -> Candidate:
        return Candidate(**{name: value(of) for name, of in stored.items()})

    result = load("choice")
    proposal = Proposal(
        chosen=candidate(result["chosen"]),
        candidates=tuple(map(candidate, result["candidates"])),
        remarks=tuple(result["remarks"]),
    )
    return candidate_table(proposal, result["compared"])


def agreement() -> str:
    """Labels of every backend against fp32 torch."""
    rows = []
    for path in sorted(RESULTS.glob("agreement_*.json")):
        result = load(path.stem)
        for row in result["rows"]:
            classes = "-" if row["same_class"] is None else f"{row['same_class']} of {row['scans']}"
            lowest = "-" if row["lowest_dice"] is None else f"{row['lowest_dice']:.4f}"
            rows.append(
                [model_and_scans(result, row), row["way"], f"{row['different']} of {row['voxels']}", lowest, classes]
            )
    header = ["model and scans", "backend and precision", "voxels that differ", "Dice of the worst label",
              "scans with the same class"]  # fmt: skip
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "parity": parity,
    "parity_rows": parity_rows,
    "rounding": rounding,
    "heads": heads,
    "demo": demo,
    "class_ways": class_ways,
    "recipes": recipes,
    "recipe_differences": recipe_differences,
    "weight_average": weight_average,
    "choice": choice,
    "agreement": agreement,
}
