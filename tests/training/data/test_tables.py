"""A data set given by a table in place of folders, and everything that can be wrong about tables."""

import csv
import shutil
import sys

import pytest
from nnturbo.training.data.tables import DatasetError, read_table

from tests.training.task_files import CASES, assert_nothing_written, prepare, scan, write_image


@pytest.fixture
def flat(source, tmp_path):
    """The same files in one folder, and the rows of a table of them."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in source.rglob("*.nii.gz"):
        shutil.copyfile(path, folder / path.name)
    return folder, [*([name, name[5], split] for name, split in CASES.items()), ["quiz_005", "", "test"]]


def write_table(path, rows, header=("filename", "subtype", "split")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


class TestTable:
    def test_gives_what_the_folders_give(self, source, flat, raw, tmp_path):
        folder, rows = flat
        rows = [
            [f"{rows[0][0]}_0000.nii.gz", *rows[0][1:]],
            [f"sub/{rows[1][0]}.nii.gz", " 1 ", "Train"],
            *rows[2:],
            [],
        ]
        table = write_table(tmp_path / "cases.csv", rows)
        by_table = prepare(folder, raw, table=table)
        by_folders = prepare(source, tmp_path / "other")
        for name in ("dataset.json", "splits_final.json", "classification_labels.csv"):
            assert (by_table.folder / name).read_text() == (by_folders.folder / name).read_text()

    def test_takes_spreadsheet_habits(self, flat, raw, tmp_path):
        folder, rows = flat
        lines = ["Split,Note,FileName,Subtype", *(f"{split},x,{name},{s and s + '.0'}" for name, s, split in rows)]
        (tmp_path / "cases.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
        assert prepare(folder, raw, table=tmp_path / "cases.csv").names("test") == ("quiz_005",)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({0: ["quiz_0_001", "3", "train"]}, "line 2: unknown subtype '3' of quiz_0_001"),
            ({0: ["quiz_0_001", "", "train"]}, "line 2: unknown subtype '' of quiz_0_001"),
            ({0: ["quiz_0_001", "1.5", "train"]}, "unknown subtype '1.5'"),
            ({0: ["quiz_0_001", "benign", "train"]}, "unknown subtype 'benign'"),
            ({4: ["quiz_005", "9", "test"]}, "line 6: unknown subtype '9'"),
            (
                {0: ["quiz_0_001", "0", "training"]},
                "line 2: split must be one of train, validation, test, got 'training'",
            ),
            ({1: ["quiz_0_001", "0", "train"]}, r"line 3: quiz_0_001 must occur once, line 2 has it too \(split train"),
            ({3: ["quiz_0_001_0000.nii.gz", "0", "validation"]}, r"line 5: quiz_0_001 must occur once"),
            ({0: ["", "0", "train"]}, "line 2: filename must not be empty"),
            ({0: ["quiz_0_999", "0", "train"]}, r"must hold the image quiz_0_999_0000\.nii\.gz once, none found"),
            ({0: ["quiz_0_999", "0", "train"]}, r"must hold the mask quiz_0_999\.nii\.gz once, none found"),
            ({2: ["quiz_0_001", "0", "train"], 3: []}, "must occur once"),
        ],
    )
    def test_refuses_a_row(self, flat, raw, tmp_path, change, text):
        folder, rows = flat
        rows = [change.get(place, row) for place, row in enumerate(rows)]
        with pytest.raises(DatasetError, match=text):
            prepare(folder, raw, table=write_table(tmp_path / "cases.csv", rows))
        assert_nothing_written(raw)

    def test_refuses_a_name_that_two_folders_have(self, flat, raw, tmp_path):
        folder, rows = flat
        write_image(folder / "more" / "quiz_0_001_0000.nii.gz", scan(70))
        with pytest.raises(DatasetError, match=r"must hold the image quiz_0_001_0000\.nii\.gz once, 2 found"):
            prepare(folder, raw, table=write_table(tmp_path / "cases.csv", rows))

    def test_refuses_a_table_without_validation(self, flat, raw, tmp_path):
        folder, rows = flat
        table = write_table(tmp_path / "cases.csv", [row for row in rows if row[2] != "validation"])
        with pytest.raises(DatasetError, match=r"cases\.csv: there must be validation cases"):
            prepare(folder, raw, table=table)

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            (
                "t.csv",
                b"name,subtype,split\n",
                r"t\.csv: the first line must name the columns .*got name, subtype, split",
            ),
            ("t.csv", b"filename,split,subtype,split\n", "each once"),
            ("t.csv", b"", "got nothing"),
            ("t.csv", b"filename,subtype,split\n\xff\xfe\n", r"t\.csv: the table cannot be read"),
            ("t.csv", b'filename,subtype,split\n"a"b,0,train\n', r"t\.csv: the table cannot be read"),
            ("t.xls", b"", r"t\.xls: a table must be a \.csv or \.xlsx file"),
        ],
    )
    def test_refuses_a_table(self, flat, raw, tmp_path, name, content, text):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=text):
            prepare(flat[0], raw, table=tmp_path / name)

    def test_names_a_missing_table(self, flat, raw, tmp_path):
        with pytest.raises(DatasetError, match=r"none\.csv: the table cannot be read: .*No such file"):
            prepare(flat[0], raw, table=tmp_path / "none.csv")


class TestXlsx:
    def test_says_what_is_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "openpyxl", None)
        with pytest.raises(DatasetError, match=r"t\.xlsx: reading xlsx needs openpyxl, .*pip install openpyxl"):
            read_table(tmp_path / "t.xlsx", ["filename"])

    def test_reads_the_first_sheet(self, flat, raw, tmp_path):
        openpyxl = pytest.importorskip("openpyxl")
        workbook = openpyxl.Workbook()
        workbook.active.append(["filename", "subtype", "split", None])
        for name, subtype, split in flat[1]:
            workbook.active.append([name, int(subtype) if subtype else None, split])
        workbook.save(tmp_path / "t.xlsx")
        assert len(prepare(flat[0], raw, table=tmp_path / "t.xlsx").cases) == 5

    def test_refuses_what_is_none(self, tmp_path):
        pytest.importorskip("openpyxl")
        (tmp_path / "t.xlsx").write_bytes(b"filename,subtype,split\n")
        with pytest.raises(DatasetError, match=r"t\.xlsx: the table cannot be read"):
            read_table(tmp_path / "t.xlsx", ["filename"])
