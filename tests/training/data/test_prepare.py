"""From folders to nnU-Net's raw data set, with everything that can be wrong about them."""

import json
import os
import re
import shutil
import types

import numpy as np
import pytest
from nnturbo.engine.errors import OutputError
from nnturbo.engine.scans.volume import read_volume
from nnturbo.training.data import prepare as prepare_module
from nnturbo.training.data.prepare import DatasetError
from nnturbo.training.phantoms.phantom import SCALED_ONE, SMALL_SETTINGS, write_dataset

from tests.training.task_files import (
    CASES,
    assert_nothing_written,
    image_of,
    labels,
    mask_of,
    prepare,
    scan,
    write_image,
)


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
            "class_names": ["0", "1", "2"],
        }
        split = {"train": ["quiz_0_001", "quiz_1_002"], "val": ["quiz_0_004", "quiz_1_003"]}
        assert json.loads((folder / "splits_final.json").read_text()) == [split]
        assert (folder / "classification_labels.csv").read_text().splitlines() == [
            "case,subtype,split",
            "quiz_0_001,0,train",
            "quiz_1_002,1,train",
            "quiz_0_004,0,validation",
            "quiz_1_003,1,validation",
        ]
        assert {path.name for path in (folder / "imagesTr").iterdir()} == {f"{name}_0000.nii.gz" for name in CASES}
        assert {path.name for path in (folder / "labelsTr").iterdir()} == {f"{name}.nii.gz" for name in CASES}
        assert [path.name for path in (folder / "imagesTs").iterdir()] == ["quiz_005_0000.nii.gz"]

    def test_a_class_without_training_cases_is_refused(self, source, raw):
        """It would stop the training, after nnU-Net has preprocessed everything."""
        write_image(source / "validation" / "subtype2" / "quiz_2_009_0000.nii.gz", scan(9))
        write_image(source / "validation" / "subtype2" / "quiz_2_009.nii.gz", labels())
        message = r"train: a class must have a training case, '2' of the validation cases has none; nothing was"
        with pytest.raises(DatasetError, match=message):
            prepare(source, raw)
        assert_nothing_written(raw)

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
    shutil.copyfile(image_of(source, "quiz_1_003"), source / "test" / "quiz_005_0000.nii.gz")
    with pytest.raises(DatasetError, match="3 problem") as caught:
        prepare(source, raw)
    assert len(str(caught.value).splitlines()) == 4
    for text in (*texts, r"quiz_005_0000.*leaked"):
        assert re.search(text, str(caught.value))


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
    assert prepare(source, raw).without_label == {"whole": ("quiz_0_001",), "lesion": ("quiz_0_001",)}
    assert "1 masks hold no lesion: quiz_0_001" in caplog.text
    assert "1 masks are empty: quiz_0_001" in caplog.text


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
        replace = type(folder).replace

        def refuse_partial(path, target):
            if ".partial-" in path.name:
                raise OSError(13, "Permission denied")
            return replace(path, target)

        monkeypatch.setattr(type(folder), "replace", refuse_partial)
        with pytest.raises(OutputError, match="cannot be written: Permission denied"):
            prepare(source, raw, overwrite=True)
        assert (folder / "kept").exists()
        assert list(raw.iterdir()) == [folder]
