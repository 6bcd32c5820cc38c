"""Which module may import which, inside functions too: imports run one way, and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.paths import ROOT

LEAVES = {"errors", "files", "options", "overlap"}
STANDS_IN = {"engine.model.given_network"}
"""Modules of the engine that call what was written for nnU-Net, with nnU-Net's own objects."""

BELOW = {  # wings, and what each may import beside itself, kernels and the leaves
    "cli": {
        *("jobs", "nnunet", "export", "engine", "bundles", "backends", "pipeline", "scans", "model"),
        *("training", "phantoms", "benchmarks"),
    },
    "nnunet": {"engine", "bundles", "backends", "pipeline", "scans", "model"},
    "jobs": {"export", "engine", "bundles", "backends", "pipeline", "scans", "model"},
    "export": {"engine", "bundles", "backends", "pipeline", "scans", "model"},
    "engine": {"bundles", "backends", "pipeline", "scans", "model"},
    "bundles": {"backends", "model"},
    "pipeline": {"scans", "model"},
    "backends": {"model"},
    "model": {"scans"},
    "scans": set(),
    "leaf": set(),
    "kernels": set(),
    "training": {
        *("jobs", "export", "engine", "bundles", "backends", "pipeline", "scans", "model"),
        *("evaluation", "data", "phantoms", "recipe"),
    },
    "evaluation": {"data", "scans"},
    "data": {"recipe", "scans", "model"},
    "phantoms": set(),
    "recipe": set(),
}


def modules() -> dict[str, Path]:
    """Every module of the engine, the kernels and the training side, by its dotted name."""
    paths = [path for folder in ("engine", "kernels", "training") for path in (ROOT / folder).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(name: str, path: Path) -> set[str]:
    """What a module imports, as dotted names below the repository; not what is only for type checkers."""
    known, tree = modules(), ast.parse(path.read_text())
    for_checkers = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECK" in ast.dump(node.test)]
    skipped = {id(inner) for node in for_checkers for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            home = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*home, *([node.module] if node.module else [])]).removeprefix("nnturbo.")
            found |= {f"{target}.{alias.name}" if f"{target}.{alias.name}" in known else target for alias in node.names}
    return found - {name}


def wing(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "training" and len(parts) > 1:
        return parts[1] if parts[1] in BELOW and parts[1] != "cli" else "training"
    if parts[0] != "engine":
        return parts[0]
    if len(parts) == 1 or parts[1] in ("engine", "ensemble", "predictor"):
        return "engine"
    return "leaf" if parts[1] in LEAVES else "model" if parts[1] == "network" else parts[1]


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_what_lies_below_it(name):
    own = wing(name)
    for other in imported(name, modules()[name]):
        without = not name.startswith("training") and own != "nnunet" and name not in STANDS_IN
        assert not (without and other.startswith("nnunetv2")), "the engine does without nnU-Net"
        if other.split(".")[0] in ("engine", "kernels", "training", "benchmarks"):
            assert wing(other) in BELOW[own] | {own, "leaf", "kernels"} - ({"leaf"} if own == "kernels" else set()), (
                other
            )


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imported(name, path) & modules().keys() for name, path in modules().items()}
    assert list(TopologicalSorter(graph).static_order())
