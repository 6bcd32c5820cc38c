import json

import pytest
from nnturbo.benchmarks import figures
from nnturbo.benchmarks.readme import DOCUMENTS, ROOT, TABLE, filled


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_are_what_the_stored_results_say(name):
    document = (ROOT / name).read_text()
    assert TABLE.search(document)
    assert filled(document) == document


def test_a_table_is_replaced_and_the_text_around_it_kept():
    document = "before\n<!-- table parity -->\nold\n<!-- end -->\nafter\n"
    result = filled(document)
    assert result.startswith("before\n<!-- table parity -->\n| models and scans |")
    assert result.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in result


@pytest.mark.parametrize("name", figures.DRAWN)
def test_figures_show_the_stored_results(name):
    assert figures.source_of(name) in (figures.FIGURES / f"{name}.svg").read_text()


@pytest.mark.parametrize("name", figures.DRAWN)
def test_a_figure_is_drawn_the_same_again_and_shows_every_number(tmp_path, monkeypatch, name):
    pytest.importorskip("matplotlib", reason="draws figures")
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    drawn = []
    for _ in range(2):
        figures.draw(name)
        drawn.append((tmp_path / f"{name}.svg").read_text())
    assert drawn[0] == drawn[1]
    assert all(f">{text}<" in drawn[0] for text in texts_of(name))


def texts_of(name):
    result = json.loads((figures.RESULTS / f"{name}.json").read_text())
    if name == "growth":
        return [*result["lines"], "nnU-Net", "nnturbo"]
    rows = result["rows"]
    return [row["step"] for row in rows] + [f"{row['median_s']:.1f} s, {row['ratio']:.1f} x" for row in rows]
