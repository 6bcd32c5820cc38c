"""Text files have an encoding of their own, not the system's, which on Windows cannot write every name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_TEXT_FILES = {"Image", "library", "os", "webbrowser"}
"""What also has a function called open."""


def without_encoding(tree):
    """Give the lines that open, read or write text and do not say how it is encoded."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function, named = call.func, {keyword.arg: keyword.value for keyword in call.keywords}
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        if "encoding" in named or name not in ("open", "read_text", "write_text", "NamedTemporaryFile"):
            continue
        if isinstance(function, ast.Attribute) and getattr(function.value, "id", None) in NO_TEXT_FILES:
            continue
        modes = [*call.args, *([named["mode"]] if "mode" in named else [])]
        is_binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        is_default = name == "NamedTemporaryFile" and not modes
        if name.endswith("_text") or not (is_binary or is_default):
            yield call.lineno


@pytest.mark.parametrize("folder", ["engine", "kernels", "training", "benchmarks"])
def test_text_is_read_and_written_in_an_encoding_of_its_own(folder):
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        if lines := list(without_encoding(ast.parse(path.read_text(encoding="utf-8")))):
            found[str(path.relative_to(ROOT))] = lines
    assert not found


def test_what_says_nothing_is_found():
    code = "open(a)\np.open('w')\np.read_text()\np.write_text('b')\nopen(a, 'rb')\np.open(mode='wb')\nos.open(a)"
    assert list(without_encoding(ast.parse(code))) == [1, 2, 3, 4]
