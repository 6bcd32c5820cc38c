"""Files that appear only when they are complete."""

import pytest
from nnturbo.engine import OutputError, files
from nnturbo.engine.files import check_writable, new_folder, put_in_place, write_json, written_atomically


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


class TestCheckWritable:
    def test_nothing_is_left_behind(self, tmp_path):
        check_writable(tmp_path / "a" / "b" / "result.json")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_in_place_of_a_folder(self, tmp_path):
        (tmp_path / "a").write_text("")
        with pytest.raises(OutputError, match="cannot be written: Not a directory"):
            check_writable(tmp_path / "a" / "b" / "result.json")

    def test_a_folder_of_someone_else(self, tmp_path, monkeypatch):
        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.mkdtemp", refuse)
        with pytest.raises(OutputError, match=r"result\.json cannot be written: Permission denied"):
            check_writable(tmp_path / "result.json")


class TestNewFolder:
    def test_it_is_there_when_the_block_ends_well(self, tmp_path):
        (tmp_path / "plain").mkdir()
        with new_folder(tmp_path / "a" / "b") as folder:
            (folder / "file").write_text("content")
            assert not (tmp_path / "a" / "b").exists()
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
        assert (tmp_path / "a" / "b" / "file").read_text() == "content"
        assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize(("raised", "shown"), [(KeyError("x"), KeyError), (OSError(28, "disk full"), OutputError)])
    def test_nothing_is_left_when_it_does_not(self, tmp_path, raised, shown):
        def fail():
            with new_folder(tmp_path / "a") as folder:
                (folder / "file").write_text("content")
                raise raised

        with pytest.raises(shown):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_what_is_there_stays(self, tmp_path):
        (tmp_path / "a").write_text("mine")
        with pytest.raises(OutputError, match="exists: choose another folder"), new_folder(tmp_path / "a"):
            pass
        assert (tmp_path / "a").read_text() == "mine"

    def test_a_long_name_is_no_obstacle(self, tmp_path):
        with new_folder(tmp_path / ("é" * 120)):
            pass
        assert len(list(tmp_path.iterdir())) == 1


class TestPutInPlace:
    """What another program has open, as Windows tells it."""

    @pytest.fixture
    def refuse(self, monkeypatch):
        """Let the next attempts fail; gives how often was waited."""
        pauses = []
        monkeypatch.setattr(files.time, "sleep", pauses.append)

        def refuse(times, **attributes):
            replace, left = files.Path.replace, [times]

            def attempt(self, target):
                if left[0]:
                    left[0] -= 1
                    error = PermissionError(13, "Permission denied")
                    vars(error).update(attributes)
                    raise error
                return replace(self, target)

            monkeypatch.setattr(files.Path, "replace", attempt)
            return pauses

        return refuse

    @pytest.mark.parametrize("winerror", [5, 32])
    def test_is_waited_for(self, tmp_path, refuse, winerror):
        pauses = refuse(3, winerror=winerror)
        write_json(tmp_path / "a.json", [1])
        assert (tmp_path / "a.json").read_text() == "[\n 1\n]\n"
        assert len(pauses) == 3

    def test_is_not_waited_for_without_end(self, tmp_path, refuse):
        pauses = refuse(100, winerror=32)
        with pytest.raises(OutputError, match=r"a\.json cannot be written: Permission denied") as busy:
            write_json(tmp_path / "a.json", [1])
        assert (busy.value.transient, busy.value.of_one_file) == (True, True)
        assert 2 < sum(pauses) < 5
        assert list(tmp_path.iterdir()) == []

    def test_what_is_not_allowed_fails_at_once(self, tmp_path, refuse):
        pauses = refuse(1)
        (tmp_path / "a").write_text("")
        with pytest.raises(PermissionError) as refused:
            put_in_place(tmp_path / "a", tmp_path / "b")
        assert pauses == []
        assert not OutputError.of("b", refused.value).transient
