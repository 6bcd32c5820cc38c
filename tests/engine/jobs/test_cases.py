"""Which scans a folder holds."""

import logging
import os

import pytest
from nnturbo.engine import ModelError, VolumeError
from nnturbo.engine.jobs.cases import find_cases
from nnturbo.engine.model.folder import read_model
from nnturbo.engine.scans.volume import read_volume

from tests.engine.factory import write_model, write_scan
from tests.engine.scans.dicom_slices import write_series


def test_files_that_macos_leaves_are_no_scans(scans):
    (scans / "._a_0000.nii.gz").write_bytes(b"\0\5\x16\7")
    assert [case.name for case in find_cases(scans, ".nii.gz")] == ["a", "b", "c"]


def test_cases_are_found(tmp_path, scans):
    write_scan(scans / "b_0001.nii.gz")
    (scans / "notes.txt").write_text("x")
    cases = find_cases(scans, ".nii.gz")
    assert [case.name for case in cases] == ["a", "b", "c"]
    assert [path.name for path in cases[1].images] == ["b_0000.nii.gz", "b_0001.nii.gz"]
    (single,) = find_cases(scans / "a_0000.nii.gz", ".nii.gz")
    assert single.name == "a"
    (other,) = find_cases(write_scan(tmp_path / "x.y.mha"), ".nii.gz")
    assert other.name == "x.y"
    (dicom,) = find_cases(write_series(tmp_path / "series"), ".nii.gz")
    assert (dicom.name, dicom.images) == ("series", (tmp_path / "series",))


def test_files_without_a_channel_number_are_named(scans):
    write_scan(scans / "d.nii.gz")
    with pytest.raises(VolumeError, match=r"1 do not, such as d\.nii\.gz"):
        find_cases(scans, ".nii.gz")
    with pytest.raises(VolumeError, match="No such file"):
        find_cases(scans / "nowhere", ".nii.gz")


@pytest.mark.parametrize("number", ["0000", "0001", "0012", "9999"])
def test_a_file_may_have_any_channel_number(tmp_path, number):
    path = write_scan(tmp_path / f"patient_{number}.nii.gz")
    (case,) = find_cases(tmp_path, ".nii.gz")
    assert (case.name, case.images) == ("patient", (path,))


def test_channels_are_taken_in_the_order_of_their_numbers(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    paths = [write_scan(tmp_path / f"a_{number}.nii.gz") for number in ("0003", "0001")]
    (case,) = find_cases(tmp_path, ".nii.gz")
    assert case.images == (paths[1], paths[0])
    assert "a: channels are not numbered 0000, 0001" in caplog.text


def test_a_name_of_nothing_but_a_number_is_none(tmp_path):
    write_scan(tmp_path / "_0000.nii.gz")
    with pytest.raises(VolumeError, match=r"1 do not, such as _0000\.nii\.gz"):
        find_cases(tmp_path, ".nii.gz")


def test_scans_with_another_ending_are_named_whatever_lies_beside_them(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "a_0000.nrrd").write_bytes(b"x")
    with pytest.raises(VolumeError, match=r"it holds 1 file\(s\) ending with \.nrrd"):
        find_cases(tmp_path, ".nii.gz")


@pytest.mark.parametrize("source", ["loop", "gone", pytest.param("pipe", marks=pytest.mark.posix("pipes with names"))])
def test_what_cannot_be_a_folder_of_scans_is_called_what_it_is(tmp_path, source):
    path = tmp_path / source
    if source == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if source == "loop" else tmp_path / "nowhere")
    with pytest.raises(VolumeError, match="must be a folder of scans, one file, or a folder of DICOM"):
        find_cases(path, ".nii.gz")


class TestOutputIsInput:
    def test_names_that_end_as_a_channel_does(self, tmp_path):
        for case in ("BraTS_0001", "BraTS_0002"):
            write_scan(tmp_path / f"{case}_0000.nii.gz")
        before = find_cases(tmp_path, ".nii.gz", tmp_path)
        write_scan(tmp_path / "BraTS_0001.nii.gz")  # the first one's result
        assert find_cases(tmp_path, ".nii.gz", tmp_path) == before
        (tmp_path / "BraTS_0001_0000.nii.gz").unlink()
        (tmp_path / "records").mkdir()
        (tmp_path / "records" / "BraTS_0001.json").write_text("{}")
        assert [case.name for case in find_cases(tmp_path, ".nii.gz", tmp_path)] == ["BraTS_0002"]

    @pytest.mark.parametrize(("source", "output"), [("p", "p/s1"), ("p", "p")])
    def test_results_do_not_go_where_slices_are(self, tmp_path, source, output):
        (tmp_path / "p").mkdir()
        write_series(tmp_path / "p" / "s1")
        write_series(tmp_path / "p" / ("s2" if output == "p/s1" else "records"))
        with pytest.raises(VolumeError, match="holds DICOM slices, and results would go there"):
            find_cases(tmp_path / source, ".nii.gz", tmp_path / output)

    def test_folders_around_the_output_are_no_series(self, tmp_path):
        write_series(tmp_path / "one")
        (tmp_path / "results" / "labels").mkdir(parents=True)
        assert [case.name for case in find_cases(tmp_path, ".nii.gz", tmp_path / "results" / "labels")] == ["one"]

    def test_own_results_are_no_scans(self, scans):
        write_scan(scans / "a.nii.gz")  # of a case that is there
        (scans / "records").mkdir()
        (scans / "records" / "gone.json").write_text("{}")
        write_scan(scans / "gone.nii.gz")  # of one that was there when it was predicted
        assert [case.name for case in find_cases(scans, ".nii.gz", scans)] == ["a", "b", "c"]
        with pytest.raises(VolumeError, match="2 do not, such as a"):
            find_cases(scans, ".nii.gz", scans.parent)

    def test_what_is_neither_scan_nor_result_is_named(self, scans):
        write_scan(scans / "d.nii.gz")
        with pytest.raises(VolumeError, match="1 do not, such as d"):
            find_cases(scans, ".nii.gz", scans)

    @pytest.mark.parametrize("output", ["labels", "."])
    def test_the_output_folder_is_no_series(self, tmp_path, output):
        for name in ("one", "two"):
            write_series(tmp_path / name)
        folder = tmp_path / output
        (folder / "records").mkdir(parents=True)
        (folder / "records" / "one.json").write_text("{}")
        write_scan(folder / "one.nii.gz")
        assert [case.name for case in find_cases(tmp_path, ".nii.gz", folder)] == ["one", "two"]


@pytest.mark.parametrize("folder", [".hidden", "__MACOSX"])
def test_folders_that_no_user_made_are_no_series(tmp_path, folder):
    write_series(tmp_path / "one")
    (tmp_path / folder).mkdir()
    assert [case.name for case in find_cases(tmp_path, ".nii.gz")] == ["one"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "it holds nothing"),
        (["a_0000.nrrd", "b_0000.nrrd"], r"it holds 2 file\(s\) ending with \.nrrd"),
        (["a_0000.NII.GZ", "b.txt", "README"], r"1 file\(s\) ending with \.NII\.GZ"),
        (["a.NII.GZ", "b.txt", "README"], r"3 file\(s\) ending with \.NII\.GZ, \.txt, no ending"),
    ],
)
def test_a_folder_without_scans_is_called_what_it_is(tmp_path, names, found):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(VolumeError, match=f"must hold scans named NAME_0000.nii.gz.*{found}"):
        find_cases(tmp_path, ".nii.gz")


def test_a_broken_link_is_called_one(tmp_path, scans):
    (scans / "d_0000.nii.gz").symlink_to(tmp_path / "moved.nii.gz")
    case = find_cases(scans, ".nii.gz")[-1]
    assert case.name == "d"
    with pytest.raises(VolumeError, match="d_0000.nii.gz: a link to .*moved.nii.gz, which does not exist"):
        read_volume(case.images[0])


def test_a_checkpoint_given_as_a_model_is_called_one(tmp_path):
    model = write_model(tmp_path / "model")
    with pytest.raises(ModelError, match="is a checkpoint: give the folder with plans.json"):
        read_model(model / "fold_0" / "checkpoint_final.pth")
