"""From folders or a table to nnU-Net's raw data set, with everything that can be wrong about them."""

import builtins
import csv
import json
import os
import re
import shutil
import sys
import types
import warnings
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import SimpleITK
from nnturbo.engine.errors import EngineError, OutputError
from nnturbo.engine.scans.volume import read_volume
from nnturbo.training.data import planning
from nnturbo.training.data import prepare as prepare_module
from nnturbo.training.data.prepare import DatasetError, plan_and_preprocess, prepare_dataset
from nnturbo.training.data.tables import read_table
from nnturbo.training.phantoms.phantom import SCALED_ONE, SMALL_SETTINGS, write_dataset

SHAPE = (4, 6, 8)
CASES = {
    "quiz_0_001": "train",
    "quiz_1_002": "train",
    "quiz_2_003": "validation",
    "quiz_0_004": "validation",
}


def write_image(path, array, *, spacing=(0.5, 0.75, 2.0), origin=(10.25, -20.5, 300.0), direction=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))
    return path


def scan(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(-100, 200, shape).astype(np.int16)


def labels(shape=SHAPE):
    mask = np.zeros(shape, np.uint8)
    mask[1:, 1:-1, 1:-1] = 1
    mask[2, 2:4, 2:5] = 2
    return mask


def image_of(source, name):
    return source / CASES[name] / f"subtype{name[5]}" / f"{name}_0000.nii.gz"


def mask_of(source, name):
    return image_of(source, name).with_name(f"{name}.nii.gz")


@pytest.fixture
def source(tmp_path):
    """A data set of eight small files in the task's folders, and a test scan."""
    folder = tmp_path / "source"
    for seed, name in enumerate(CASES):
        write_image(image_of(folder, name), scan(seed))
        write_image(mask_of(folder, name), labels())
    write_image(folder / "test" / "quiz_005_0000.nii.gz", scan(99))
    return folder


@pytest.fixture
def flat(source, tmp_path):
    """The same files in one folder, and the rows of a table of them."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in source.rglob("*.nii.gz"):
        shutil.copyfile(path, folder / path.name)
    return folder, [*([name, name[5], split] for name, split in CASES.items()), ["quiz_005", "", "test"]]


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw"


def prepare(source, raw, **arguments):
    return prepare_dataset(source, raw, **{"dataset_id": 7, "dataset_name": "Pancreas", **arguments})


def write_table(path, rows, header=("filename", "subtype", "split")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def assert_nothing_written(raw):
    assert not raw.exists() or not list(raw.iterdir())


class TestFolders:
    def test_writes_what_nnunet_reads(self, source, raw):
        seen = []
        dataset = prepare(source, raw, progress=lambda *step: seen.append(step))
        folder = raw / "Dataset007_Pancreas"
        assert dataset.folder == folder
        assert list(raw.iterdir()) == [folder]
        assert dataset.names("train") == ("quiz_0_001", "quiz_1_002")
        assert seen == [(n, 5, case.name) for n, case in enumerate(dataset.cases, start=1)]
        assert json.loads((folder / "dataset.json").read_text()) == {
            "name": "Dataset007_Pancreas",
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "pancreas": 1, "lesion": 2},
            "numTraining": 4,
            "file_ending": ".nii.gz",
        }
        split = {"train": ["quiz_0_001", "quiz_1_002"], "val": ["quiz_0_004", "quiz_2_003"]}
        assert json.loads((folder / "splits_final.json").read_text()) == [split]
        assert (folder / "classification_labels.csv").read_text().splitlines() == [
            "case,subtype,split",
            "quiz_0_001,0,train",
            "quiz_1_002,1,train",
            "quiz_0_004,0,validation",
            "quiz_2_003,2,validation",
        ]
        assert {path.name for path in (folder / "imagesTr").iterdir()} == {f"{name}_0000.nii.gz" for name in CASES}
        assert {path.name for path in (folder / "labelsTr").iterdir()} == {f"{name}.nii.gz" for name in CASES}
        assert [path.name for path in (folder / "imagesTs").iterdir()] == ["quiz_005_0000.nii.gz"]

    def test_images_are_links_and_masks_have_the_images_grid(self, source, raw):
        dataset = prepare(source, raw)
        image, mask = (
            dataset.folder / place for place in ("imagesTr/quiz_1_002_0000.nii.gz", "labelsTr/quiz_1_002.nii.gz")
        )
        assert dataset.linked == 5
        assert image.samefile(image_of(source, "quiz_1_002"))
        written = read_volume(mask)
        assert written.array.dtype == np.uint8
        assert written.geometry == read_volume(image).geometry
        np.testing.assert_array_equal(written.array[0], labels())

    def test_images_are_copied_where_links_cannot_be(self, source, raw, monkeypatch):
        def refuse(*_, **__):
            raise OSError("cross-device link")

        monkeypatch.setattr(os, "link", refuse)
        dataset = prepare(source, raw)
        copy = dataset.folder / "imagesTr" / "quiz_1_002_0000.nii.gz"
        assert dataset.linked == 0
        assert not copy.samefile(image_of(source, "quiz_1_002"))
        assert copy.read_bytes() == image_of(source, "quiz_1_002").read_bytes()

    def test_rounds_scaled_masks(self, source, raw):
        write_image(mask_of(source, "quiz_0_001"), labels() * SCALED_ONE)
        dataset = prepare(source, raw)
        assert dataset.rounded == ("quiz_0_001",)
        written = read_volume(dataset.folder / "labelsTr" / "quiz_0_001.nii.gz").array[0]
        assert written.dtype == np.uint8
        np.testing.assert_array_equal(written, labels())

    def test_takes_phantoms(self, tmp_path, raw):
        write_dataset(tmp_path / "phantoms", counts={"train": 1, "validation": 1}, settings=SMALL_SETTINGS)
        assert len(prepare(tmp_path / "phantoms", raw).cases) == 2

    def test_hidden_files_and_other_endings_are_passed_over(self, source, raw):
        for name in (".DS_Store", "subtype0/._quiz_0_001_0000.nii.gz", "subtype0/notes.txt"):
            (source / "train" / name).write_bytes(b"?")
        assert len(prepare(source, raw).cases) == 5

    def test_a_data_set_without_test_split_is_fine(self, source, raw):
        shutil.rmtree(source / "test")
        assert list((prepare(source, raw).folder / "imagesTs").iterdir()) == []


def missing_mask(source):
    mask_of(source, "quiz_0_001").unlink()
    return r"quiz_0_001_0000\.nii\.gz: the mask quiz_0_001\.nii\.gz must lie beside the image"


def missing_image(source):
    image_of(source, "quiz_0_001").unlink()
    return r"quiz_0_001\.nii\.gz: the image quiz_0_001_0000\.nii\.gz must lie beside the mask"


def missing_split(source):
    shutil.rmtree(source / "validation")
    return "source/validation: this folder must exist"


def empty_split(source):
    shutil.rmtree(source / "validation")
    (source / "validation" / "subtype0").mkdir(parents=True)
    return "there must be validation cases, got none"


def unknown_subtype_folder(source):
    (source / "train" / "subtype7").mkdir()
    return r"train/subtype7: unknown subtype"


def file_beside_the_folders(source):
    shutil.copyfile(image_of(source, "quiz_0_001"), source / "train" / "quiz_0_009_0000.nii.gz")
    return r"quiz_0_009_0000\.nii\.gz: unknown subtype"


def strange_name(source):
    image_of(source, "quiz_0_001").rename(image_of(source, "quiz_0_001").with_name("case1_0000.nii.gz"))
    return r"case1_0000\.nii\.gz: the name must be quiz_0_<number>_0000"


def strange_test_name(source):
    write_image(source / "test" / "scan_0000.nii.gz", scan(5))
    return r"scan_0000\.nii\.gz: a test image must be named quiz_<number>_0000"


def wrong_folder(source):
    for path in (image_of(source, "quiz_0_001"), mask_of(source, "quiz_0_001")):
        (source / "train" / "subtype2").mkdir(exist_ok=True)
        path.rename(source / "train" / "subtype2" / path.name)
    return "the name says subtype 0, the folder subtype 2"


def same_name_in_both_splits(source):
    write_image(source / "validation" / "subtype0" / "quiz_0_001_0000.nii.gz", scan(50))
    write_image(source / "validation" / "subtype0" / "quiz_0_001.nii.gz", labels())
    return "validation/subtype0/quiz_0_001.*must occur once"


def leaked_scan(source):
    shutil.copyfile(image_of(source, "quiz_0_001"), image_of(source, "quiz_0_004"))
    return r"quiz_0_004_0000\.nii\.gz: leaked, the same scan as .*quiz_0_001_0000\.nii\.gz of the train split"


def leaked_scan_in_another_type(source):
    write_image(source / "test" / "quiz_005_0000.nii.gz", scan(0).astype(np.float32), spacing=(1, 1, 1))
    return r"quiz_005_0000\.nii\.gz: leaked, the same scan as .*quiz_0_001"


def doubled_scan(source):
    shutil.copyfile(image_of(source, "quiz_0_001"), image_of(source, "quiz_1_002"))
    return r"quiz_1_002_0000\.nii\.gz: a scan must occur once, .*quiz_0_001"


def other_shape(source):
    write_image(mask_of(source, "quiz_1_002"), labels((5, 6, 8)))
    return r"quiz_1_002\.nii\.gz: shape \(z, y, x\) is \(5, 6, 8\), but \(4, 6, 8\)"


def other_spacing(source):
    write_image(mask_of(source, "quiz_1_002"), labels(), spacing=(0.5, 0.75, 2.1))
    return r"quiz_1_002\.nii\.gz: spacing"


def other_origin(source):
    write_image(mask_of(source, "quiz_1_002"), labels(), origin=(0, 0, 0))
    return r"quiz_1_002\.nii\.gz: origin"


def other_direction(source):
    write_image(mask_of(source, "quiz_1_002"), labels(), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    return r"quiz_1_002\.nii\.gz: direction"


def unknown_label(source):
    write_image(mask_of(source, "quiz_1_002"), labels() + 1)
    return r"quiz_1_002\.nii\.gz: labels must be 0, 1 or 2 .*got 3"


def negative_label(source):
    write_image(mask_of(source, "quiz_1_002"), -labels().astype(np.int16))
    return "got -2, -1"


def label_between_integers(source):
    write_image(mask_of(source, "quiz_1_002"), labels() * np.float32(1.02))
    return r"labels must be 0, 1 or 2 .*got 1\.02, 2\.04"


def damaged_image(source):
    image_of(source, "quiz_1_002").write_bytes(image_of(source, "quiz_1_002").read_bytes()[:60])
    return r"quiz_1_002_0000\.nii\.gz"


def damaged_mask(source):
    mask_of(source, "quiz_1_002").write_bytes(b"not gzip")
    return r"quiz_1_002\.nii\.gz"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_mask,
        missing_image,
        missing_split,
        empty_split,
        unknown_subtype_folder,
        file_beside_the_folders,
        strange_name,
        strange_test_name,
        wrong_folder,
        same_name_in_both_splits,
        leaked_scan,
        leaked_scan_in_another_type,
        doubled_scan,
        other_shape,
        other_spacing,
        other_origin,
        other_direction,
        unknown_label,
        negative_label,
        label_between_integers,
        damaged_image,
        damaged_mask,
    ],
)
def test_refuses_before_writing(source, raw, spoil):
    text = spoil(source)
    with pytest.raises(DatasetError, match=text):
        prepare(source, raw)
    assert_nothing_written(raw)


def test_names_all_problems_at_once(source, raw):
    texts = [spoil(source) for spoil in (missing_mask, unknown_label)]
    shutil.copyfile(image_of(source, "quiz_2_003"), source / "test" / "quiz_005_0000.nii.gz")
    with pytest.raises(DatasetError, match="3 problem") as caught:
        prepare(source, raw)
    assert len(str(caught.value).splitlines()) == 4
    for text in (*texts, r"quiz_005_0000.*leaked"):
        assert re.search(text, str(caught.value))


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


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(source, raw, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("train/subtype1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError, match="train/subtype1: the folder cannot be listed: Permission denied"):
        prepare(source, raw)
    assert_nothing_written(raw)


def test_images_that_lie_elsewhere_are_named(source, raw):
    for path in ("train/subtype0/more/quiz_0_009_0000.nii.gz", "test/subtype1/quiz_008_0000.nii.gz"):
        write_image(source / path, scan(60))
    write_image(source / "validation" / "quiz_0_010.nii.gz", labels()).rename(
        source / "validation" / "quiz_0_010.NII.GZ"
    )
    with pytest.raises(DatasetError, match="3 problem") as caught:
        prepare(source, raw)
    for text in (
        "more/quiz_0_009.*must lie in",
        "subtype1/quiz_008.*must lie in",
        "quiz_0_010.NII.GZ: unknown subtype",
    ):
        caught.match(text)


def test_masks_without_lesion_are_named_and_kept(source, raw, caplog):
    write_image(mask_of(source, "quiz_0_001"), labels() * np.uint8(0))
    assert prepare(source, raw).without_lesion == ("quiz_0_001",)
    assert "1 masks hold no lesion: quiz_0_001" in caplog.text


class TestTarget:
    @pytest.mark.parametrize("number", [0, 1000, -1])
    def test_refuses_an_id(self, source, raw, number):
        with pytest.raises(ValueError, match="dataset_id must lie in 1 to 999"):
            prepare(source, raw, dataset_id=number)

    @pytest.mark.parametrize("name", ["", "a b", "../x"])
    def test_refuses_a_name(self, source, raw, name):
        with pytest.raises(ValueError, match="dataset_name must be letters"):
            prepare(source, raw, dataset_name=name)

    def test_refuses_a_missing_source(self, tmp_path, raw):
        with pytest.raises(DatasetError, match="nowhere: the source must be a folder"):
            prepare(tmp_path / "nowhere", raw)

    def test_refuses_an_existing_folder(self, source, raw):
        folder = prepare(source, raw).folder
        with pytest.raises(OutputError, match="Dataset007_Pancreas exists.*overwrite=True"):
            prepare(source, raw)
        (folder / "stale").touch()
        prepare(source, raw, overwrite=True)
        assert list(raw.iterdir()) == [folder]
        assert not (folder / "stale").exists()

    def test_a_bad_source_leaves_the_existing_folder(self, source, raw):
        folder = prepare(source, raw).folder
        before = sorted(path.name for path in folder.rglob("*"))
        missing_mask(source)
        with pytest.raises(DatasetError):
            prepare(source, raw, overwrite=True)
        assert sorted(path.name for path in folder.rglob("*")) == before

    def test_refuses_an_id_that_is_taken(self, source, raw):
        prepare(source, raw)
        with pytest.raises(OutputError, match="Dataset007_Pancreas has the same id"):
            prepare(source, raw, dataset_name="Other")

    def test_refuses_a_full_disk(self, source, raw, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        with pytest.raises(OutputError, match=r"needs about .* MB, .* has 0 MB free; make room"):
            prepare(source, raw)
        assert_nothing_written(raw)

    def test_counts_images_that_cannot_be_linked(self, source, raw, monkeypatch):
        image_bytes = sum(path.stat().st_size for path in source.rglob("*_0000.nii.gz"))
        mask_bytes = sum(path.stat().st_size for path in source.rglob("*.nii.gz")) - image_bytes
        free = mask_bytes + image_bytes // 2 + prepare_module._SPARE_BYTES
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
        prepare(source, raw)
        stat = os.stat
        on_another_disk = types.SimpleNamespace(st_dev=-1)
        monkeypatch.setattr(
            prepare_module.os, "stat", lambda path, **k: on_another_disk if k == {} else stat(path, **k)
        )
        with pytest.raises(OutputError, match="make room"):
            prepare(source, raw, dataset_id=8)

    def test_an_interruption_leaves_nothing(self, source, raw, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(prepare_module, "_write_descriptions", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, raw)
        assert_nothing_written(raw)

    def test_a_failed_rename_puts_the_old_folder_back(self, source, raw, monkeypatch):
        folder = prepare(source, raw).folder
        (folder / "kept").touch()
        rename = type(folder).rename

        def refuse_partial(path, target):
            if ".partial-" in path.name:
                raise OSError(13, "Permission denied")
            return rename(path, target)

        monkeypatch.setattr(type(folder), "rename", refuse_partial)
        with pytest.raises(OutputError, match="cannot be written: Permission denied"):
            prepare(source, raw, overwrite=True)
        assert (folder / "kept").exists()
        assert list(raw.iterdir()) == [folder]


@pytest.fixture(scope="module")
def nnunet():
    """The module that extracts fingerprints; nnU-Net's imports warn about what is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor")
        pytest.importorskip("nnunetv2.preprocessing.preprocessors.default_preprocessor")
    return module


@pytest.fixture
def in_threads(nnunet, monkeypatch):
    """Let nnU-Net work in threads, which start at once, and sample fewer than a hundred million voxels."""
    monkeypatch.setattr(nnunet.multiprocessing, "get_context", lambda method: types.SimpleNamespace(Pool=ThreadPool))
    collect = nnunet.DatasetFingerprintExtractor.collect_foreground_intensities
    few = staticmethod(lambda segmentation, images, num_samples: collect(segmentation, images, num_samples=500))
    monkeypatch.setattr(nnunet.DatasetFingerprintExtractor, "collect_foreground_intensities", few)


@pytest.fixture
def bright_validation(tmp_path, raw):
    """A raw data set whose validation cases are brighter, larger and of other spacing than the training cases."""
    source = tmp_path / "source"
    for seed, (name, split) in enumerate(CASES.items()):
        is_train = split == "train"
        shape, spacing = ((20, 24, 28), (1, 1, 2)) if is_train else ((24, 32, 36), (0.5, 0.5, 5))
        write_image(image_of(source, name), scan(seed, shape) + np.int16(0 if is_train else 1000), spacing=spacing)
        write_image(mask_of(source, name), labels(shape), spacing=spacing)
    return prepare(source, raw)


class TestPlanning:
    @pytest.mark.parametrize(
        ("planner", "plans"), [("resenc", "nnUNetResEncUNetMPlans.json"), ("plain", "nnUNetPlans.json")]
    )
    def test_validation_stays_out_of_the_plans(
        self, bright_validation, tmp_path, in_threads, monkeypatch, planner, plans
    ):
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            monkeypatch.delenv(name, raising=False)
        plans_file = plan_and_preprocess(bright_validation.folder, tmp_path / "pre", planner=planner, processes=1)
        folder = tmp_path / "pre" / "Dataset007_Pancreas"
        assert plans_file == folder / plans
        fingerprint = json.loads((folder / "dataset_fingerprint.json").read_text())
        assert fingerprint["spacings"] == [[2.0, 1.0, 1.0]] * 2
        assert fingerprint["shapes_after_crop"] == [[20, 24, 28]] * 2
        assert fingerprint["foreground_intensity_properties_per_channel"]["0"]["max"] < 200
        content = json.loads(plans_file.read_text())
        assert content["foreground_intensity_properties_per_channel"]["0"]["max"] < 200
        assert content["configurations"]["3d_fullres"]["spacing"] == [2.0, 1.0, 1.0]
        preprocessed = folder / content["configurations"]["3d_fullres"]["data_identifier"]
        assert {path.stem for path in preprocessed.glob("*.pkl")} == set(CASES)
        assert {path.name for path in (folder / "gt_segmentations").iterdir()} == {f"{name}.nii.gz" for name in CASES}
        for name in ("splits_final.json", "classification_labels.csv", "dataset.json"):
            assert (folder / name).read_text() == (bright_validation.folder / name).read_text()
        assert "nnUNet_raw" not in os.environ

    def test_refuses_an_unknown_configuration_and_restores_the_environment(
        self, bright_validation, tmp_path, in_threads, monkeypatch
    ):
        monkeypatch.setenv("nnUNet_raw", "before")
        with pytest.raises(ValueError, match=r"configurations must be among .*3d_fullres.*, got 4d"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre", configurations=["4d"], planner="plain")
        assert os.getenv("nnUNet_raw") == "before"  # noqa: SIM112 (nnU-Net's own spelling)

    def test_refuses_what_was_made_with_another_split(self, bright_validation, tmp_path):
        present = tmp_path / "pre" / "Dataset007_Pancreas" / "splits_final.json"
        present.parent.mkdir(parents=True)
        present.write_text(json.dumps([{"train": list(CASES), "val": []}]))
        with pytest.raises(DatasetError, match=r"splits_final\.json holds another split than .*: remove"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    @pytest.mark.parametrize("content", ["", "{}", "[]", '[{"train": []}]', "[1]"])
    def test_refuses_a_damaged_split(self, bright_validation, tmp_path, content):
        (bright_validation.folder / "splits_final.json").write_text(content)
        with pytest.raises(DatasetError, match=r"splits_final\.json must be a list of splits with train and val"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    def test_says_when_nnunet_fails(self, bright_validation, tmp_path, monkeypatch):
        def fail(*_):
            raise RuntimeError("Some background worker is 6 feet under")

        monkeypatch.setattr(planning, "_plan", fail)
        with pytest.raises(EngineError, match=r"nnU-Net failed on .*Dataset007_Pancreas: .*take fewer processes"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    @pytest.mark.parametrize("name", ["dataset.json", "splits_final.json", "classification_labels.csv"])
    def test_refuses_another_folder(self, bright_validation, tmp_path, name):
        (bright_validation.folder / name).unlink()
        with pytest.raises(DatasetError, match=f"{name} is missing: make the folder with nnturbo prepare"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    def test_refuses_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="planner must be one of resenc, plain, compact, got 'best'"):
            plan_and_preprocess(tmp_path, tmp_path, planner="best")
        with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
            plan_and_preprocess(tmp_path, tmp_path, processes=0)

    def test_says_how_to_install_nnunet(self, bright_validation, tmp_path, monkeypatch):
        importing = builtins.__import__

        def without_nnunet(name, *arguments, **more):
            if name.startswith("nnunetv2"):
                raise ImportError(f"No module named {name}")
            return importing(name, *arguments, **more)

        monkeypatch.setattr(builtins, "__import__", without_nnunet)
        with pytest.raises(EngineError, match=r"planning needs nnU-Net .*pip install 'nnturbo\[training\]'"):
            plan_and_preprocess(bright_validation.folder, tmp_path / "pre")

    @pytest.mark.slow  # nnU-Net starts processes that each import torch, and samples 33 million voxels a case
    def test_runs_in_processes(self, bright_validation, tmp_path, nnunet):
        assert plan_and_preprocess(bright_validation.folder, tmp_path / "pre", processes=1).is_file()
