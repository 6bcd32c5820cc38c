"""Files that appear only when they are complete."""

import pytest
from nnturbo.engine import OutputError
from nnturbo.engine.files import write_json, written_atomically


class TestWrittenAtomically:
    def test_nothing_appears_before_the_end_nor_after_a_failure(self, tmp_path):
        path = tmp_path / "result.json"
        path.write_text("old")

        def fail():
            with written_atomically(path) as temporary:
                temporary.write_text("new")
                assert path.read_text() == "old"
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
        assert path.read_text() == "old"

    def test_a_full_disk_is_said(self, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match=r"a\.json cannot be written: No space left on device"):
            write_json(tmp_path / "a.json", {})
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_folder_is_said(self, tmp_path):
        with pytest.raises(OutputError, match="cannot be written: No such file"):
            write_json(tmp_path / "no" / "a.json", {})

    def test_permissions_are_those_of_any_new_file(self, tmp_path):
        write_json(tmp_path / "a.json", {})
        (tmp_path / "b.json").write_text("{}")
        assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode
