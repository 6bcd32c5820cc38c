"""Predictions of the test split to a zip, and everything that must not get into one."""

import shutil
import zipfile

import numpy as np
import pytest
from nnturbo.engine.errors import OutputError
from nnturbo.training.data.tables import DatasetError
from nnturbo.training.evaluation.submission import write_submission

from tests.training.evaluation.masks import labels, write_mask, write_results

NAMES = ("quiz_003", "quiz_041")


@pytest.fixture
def images(tmp_path):
    for name in NAMES:
        write_mask(tmp_path / "images" / f"{name}_0000.nii.gz", labels().astype(np.int16))
    return tmp_path / "images"


@pytest.fixture
def predictions(tmp_path):
    """What can be handed in; tests spoil it. Other files of `nnturbo predict` lie beside the masks."""
    folder = tmp_path / "predictions"
    for name in NAMES:
        write_mask(folder / f"{name}.nii.gz", labels())
    write_results(folder, ["quiz_041.nii.gz,2.0", "quiz_003.nii.gz,0"])
    (folder / "predictions.json").write_text("{}")
    return folder


def test_zip_is_flat_and_complete(predictions, images, tmp_path):
    path = tmp_path / "submission.zip"
    done = write_submission(predictions, path, images_folder=images)
    assert (done.path, done.subtypes, done.compared_with_images) == (path, {"quiz_041": "2", "quiz_003": "0"}, True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["quiz_003.nii.gz", "quiz_041.nii.gz", "subtype_results.csv"]
        assert archive.read("subtype_results.csv") == b"Names,Subtype\nquiz_003.nii.gz,0\nquiz_041.nii.gz,2\n"
        assert archive.read("quiz_041.nii.gz") == (predictions / "quiz_041.nii.gz").read_bytes()
        assert all(member.external_attr >> 16 == 0o644 for member in archive.infolist())


def test_same_predictions_give_the_same_bytes(predictions, tmp_path):
    first, second = (write_submission(predictions, tmp_path / name).path for name in ("a.zip", "b.zip"))
    assert first.read_bytes() == second.read_bytes()


def test_without_images_masks_and_rows_are_compared(predictions, tmp_path):
    assert not write_submission(predictions, tmp_path / "a.zip").compared_with_images
    write_results(predictions, ["quiz_041.nii.gz,2"])
    with pytest.raises(DatasetError, match=r"quiz_003: the row quiz_003\.nii\.gz of subtype_results\.csv is missing"):
        write_submission(predictions, tmp_path / "b.zip")


def test_takes_another_table(predictions, tmp_path):
    (predictions / "subtype_results.csv").rename(tmp_path / "other.csv")
    assert len(write_submission(predictions, tmp_path / "a.zip", subtypes=tmp_path / "other.csv").subtypes) == 2


def no_mask(folder):
    (folder / "quiz_003.nii.gz").unlink()
    return r"quiz_003: the mask quiz_003\.nii\.gz is missing"


def extra_mask(folder):
    shutil.copyfile(folder / "quiz_003.nii.gz", folder / "quiz_077.nii.gz")
    write_results(folder, [f"{name}.nii.gz,0" for name in (*NAMES, "quiz_077")])
    return r"quiz_077\.nii\.gz: there is no image of this case"


def extra_row(folder):
    write_results(folder, [f"{name}.nii.gz,0" for name in (*NAMES, "quiz_077")])
    return r"subtype_results\.csv: quiz_077\.nii\.gz is none of the cases"


def doubled_row(folder):
    write_results(folder, [f"{name}.nii.gz,0" for name in (*NAMES, NAMES[0])])
    return r"subtype_results\.csv: line 4: quiz_003\.nii\.gz must occur once"


def other_header(folder):
    write_results(folder, [f"{name}.nii.gz,0" for name in NAMES], header="Names;Subtype")
    return "the header must be exactly Names,Subtype, got Names;Subtype"


def no_table(folder):
    (folder / "subtype_results.csv").unlink()
    return r"subtype_results\.csv: the table cannot be read: No such file or directory; check the path"


def other_grid(folder):
    write_mask(folder / "quiz_003.nii.gz", labels()[:3])
    return r"quiz_003\.nii\.gz: shape \(z, y, x\) is \(3, 6, 6\), but \(4, 6, 6\) in quiz_003_0000\.nii\.gz"


def other_type(folder):
    write_mask(folder / "quiz_003.nii.gz", labels().astype(np.float64))
    return r"quiz_003\.nii\.gz: a mask must be stored as uint8, got float64"


def other_label(folder):
    write_mask(folder / "quiz_003.nii.gz", labels() + 1)
    return r"quiz_003\.nii\.gz: labels must be 0, 1 or 2, got 3"


def damaged_mask(folder):
    (folder / "quiz_003.nii.gz").write_bytes(b"not gzip")
    return r"quiz_003\.nii\.gz"


def other_name(folder):
    write_mask(folder / "scan.nii.gz", labels())
    return r"scan\.nii\.gz: a test case must be named quiz_<number>\.nii\.gz"


def no_masks(folder):
    for path in folder.glob("*.nii.gz"):
        path.unlink()
    return "predictions: there must be masks named quiz_<number>"


@pytest.mark.parametrize(
    "spoil",
    [
        no_mask,
        extra_mask,
        extra_row,
        doubled_row,
        other_header,
        no_table,
        other_grid,
        other_type,
        other_label,
        damaged_mask,
        other_name,
        no_masks,
    ],
)
def test_refuses_and_leaves_the_existing_zip(predictions, images, tmp_path, spoil):
    path = tmp_path / "submission.zip"
    path.write_bytes(b"mine")
    text = spoil(predictions)
    with pytest.raises(DatasetError, match=text):
        write_submission(predictions, path, images_folder=images, overwrite=True)
    assert path.read_bytes() == b"mine"


def test_refuses_folders_without_images(predictions, tmp_path):
    with pytest.raises(DatasetError, match="there must be test images named quiz_<number>_0000"):
        write_submission(predictions, tmp_path / "a.zip", images_folder=predictions)


def test_existing_zips_are_replaced_on_demand_only(predictions, tmp_path):
    path = tmp_path / "submission.zip"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"submission\.zip exists: .*--overwrite"):
        write_submission(predictions, path)
    assert path.read_bytes() == b"mine"
    write_submission(predictions, path, overwrite=True)
    assert zipfile.is_zipfile(path)


def test_the_name_must_be_that_of_a_zip(predictions, tmp_path):
    with pytest.raises(ValueError, match=r"quiz_003\.nii\.gz: the name of a submission must end with \.zip"):
        write_submission(predictions, predictions / "quiz_003.nii.gz", overwrite=True)


def test_an_interruption_leaves_the_existing_zip(predictions, tmp_path, monkeypatch):
    path = tmp_path / "submission.zip"
    path.write_bytes(b"mine")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_submission(predictions, path, overwrite=True)
    assert path.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {"predictions", "submission.zip"}
