"""Documents: links lead somewhere, tables can be read alone, and commands and code are those that exist."""

import ast
import importlib
import os
import re
import shlex

import pytest
from nnturbo.benchmarks import readme
from nnturbo.engine.cli import main

from tests.paths import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(document):
    return BLOCK.sub("", document.read_text())


def anchors(document):
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(document):
    """Command lines of code blocks, and those in the text; each once, without comments."""
    text = document.read_text()
    blocks = [content for _, content in BLOCK.findall(text)] + re.findall(r"^ {4}\S.*$", text, re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.split(" #")[0].strip() for line in lines] + re.findall(r"`([^`\n]+)`", prose(document))
    return sorted(set(found))


@each_document
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@each_document
def test_every_column_has_a_heading_and_every_row_all_columns(document):
    lines = prose(document).splitlines()
    width = None
    for above, line in zip(["", *lines], lines, strict=False):
        if not line.startswith("|"):
            width = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not above.startswith("|"):
            width = len(cells)
        assert len(cells) == width, line
        assert all(cells), line


@each_document
def test_commands_of_nnturbo_exist(document, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    blocks = "\n".join(content for _, content in BLOCK.findall(document.read_text())).replace("\\\n", " ")
    whole = re.findall(r"^nnturbo .*$", blocks, re.MULTILINE)
    for line in [re.sub(r"\s#.*", "", each) for each in whole]:
        assert callable(_parse(line).run), line
    for line in commands(document):
        if line.startswith("nnturbo "):
            _, command, *words = line.split()
            with pytest.raises(SystemExit) as ended:
                main([command, "--help"])
            assert ended.value.code == 0, line
            flags = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", capsys.readouterr().out))
            assert {word for word in words if re.fullmatch(r"--?[A-Za-z].*", word)} <= flags, line


def _parse(line):
    from nnturbo.engine.cli.main import _parser

    return _parser().parse_args(shlex.split(os.path.expandvars(line))[1:])


@each_document
def test_modules_and_targets_that_are_run_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    for line in commands(document):
        for module in re.findall(r"\bpython -m nnturbo\.([\w.]+)", line):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), line
        for target in re.findall(r"^make (\w[\w-]*)", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        for tests in re.findall(r"\bpytest ([\w/.]+)", line):
            assert (ROOT / tests).exists(), line


@each_document
def test_extras_exist(document):
    known = set(re.findall(r"^([\w-]+) = \[$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for names in re.findall(r"(?:['\"]|nnturbo)\.?\[([a-z0-9,-]+)\]['\"]", document.read_text()):
        assert set(names.split(",")) <= known, names


@each_document
def test_python_is_python_and_imports_names_that_exist(document):
    for language, content in BLOCK.findall(document.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nnturbo"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_every_document_with_tables_is_filled_and_every_table_is_shown():
    shown = {document: readme.TABLE.findall(document.read_text()) for document in DOCUMENTS}
    assert {str(document.relative_to(ROOT)) for document, tables in shown.items() if tables} == set(readme.DOCUMENTS)
    assert {name for tables in shown.values() for _, name, _ in tables} == set(readme.TABLES)
