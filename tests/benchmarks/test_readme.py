import pytest
from nnturbo.benchmarks.readme import DOCUMENTS, ROOT, TABLE, filled


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_are_what_the_stored_results_say(name):
    document = (ROOT / name).read_text()
    assert TABLE.search(document)
    assert filled(document) == document


def test_a_table_is_replaced_and_the_text_around_it_kept():
    document = "before\n<!-- table parity -->\nold\n<!-- end -->\nafter\n"
    result = filled(document)
    assert result.startswith("before\n<!-- table parity -->\n| voxels with another label |")
    assert result.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in result
