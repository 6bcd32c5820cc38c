"""The commands of the training side: end to end on phantoms, and one line for whatever is wrong."""

import json
import shlex
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
from nnturbo.engine.cli import main
from nnturbo.training import recipe
from nnturbo.training.cli import choices
from nnturbo.training.data import planners, planning
from nnturbo.training.phantoms import phantom

from tests.training.task_files import CASES, image_of, labels, mask_of, scan, write_image


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    counts = ["--train", "3", "--validation", "2", "--test", "2"]
    assert main(["phantom", "-o", str(folder), *counts, "--seed", "3", "--small", "--answers"]) == 0
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    """Run a command line whose {words} are names in the test's folder."""

    def run(line, **names):
        status = main([word.format(tmp=tmp_path, **names) for word in shlex.split(line)])
        return status, *capsys.readouterr()

    return run


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flat_masks(source, target):
    """Copy masks out of any folders, as predictions."""
    target.mkdir()
    for path in source.rglob("*.nii.gz"):
        if "_0000" not in path.name:
            shutil.copyfile(path, target / path.name)
    rows = [f"{path.name},{path.name[5]}\n" for path in sorted(target.glob("*.nii.gz"))]
    (target / "subtype_results.csv").write_text("Names,Subtype\n" + "".join(rows))
    return target


class TestEndToEnd:
    def test_phantom(self, phantoms, run):
        assert len(list(phantoms.glob("train/subtype?/quiz_?_???_0000.nii.gz"))) == 3
        assert len(list(phantoms.glob("test/quiz_???_0000.nii.gz"))) == 2
        assert (phantoms / "test_answers" / "subtype_results.csv").read_text().startswith("Names,Subtype\n")
        before = files_in(phantoms)
        status, out, error = run("phantom -o {data} --train 3 --validation 2 --test 2 --small", data=phantoms)
        assert (status, out, error.count("\n")) == (2, "", 1)
        assert "exist, the first is" in error
        assert "--overwrite" in error
        assert files_in(phantoms) == before

    def test_prepare_and_evaluate(self, phantoms, run, raw, tmp_path, in_threads, monkeypatch):
        monkeypatch.setenv("nnUNet_raw", str(raw))
        monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # as for a training that is to be repeated bit for bit
        line = "prepare -i {data} -d 801 -n Phantom --planner compact --processes 1"
        status, out, error = run(line, data=phantoms)
        assert (status, error) == (0, "")
        folder = raw / "Dataset801_Phantom"
        plans_file = tmp_path / "pre" / folder.name / "nnUNetCompactPlans.json"
        assert f"{folder}: 3 train, 2 validation, 2 test;" in out
        assert f"plans: {plans_file}\n" in out
        assert out.endswith("next: nnturbo train -d 801 -c 3d_fullres -p nnUNetCompactPlans\n")
        assert len(json.loads((plans_file.parent / "dataset_fingerprint.json").read_text())["spacings"]) == 3
        assert len(list((plans_file.parent / "nnUNetCompactPlans_3d_fullres").glob("*.pkl"))) == 5
        assert len(list((folder / "imagesVal").iterdir())) == 2

        predictions = flat_masks(phantoms / "validation", tmp_path / "predictions")
        for references in (phantoms, phantoms / "validation", folder, folder / "labelsTr", plans_file.parent):
            status, out, error = run("evaluate -p {p} -r {r} -o {tmp}/evaluation", p=predictions, r=references)
            assert (status, error) == (0, "")
            assert "| over 2 cases | measured | 95 % interval | target | reached | best published |" in out
            assert out.count("| 1.000 | 1.000 to 1.000 |") == 3
            found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
            assert [part["dsc"] for part in found["structures"].values()] == [1, 1]
            assert found["subtypes"]["metrics"]["macro_f1"] == 1
            assert {path.suffix for path in (tmp_path / "evaluation").iterdir()} == {".json", ".csv", ".png"}

    def test_submit_and_the_answers(self, phantoms, run, tmp_path):
        answers = phantoms / "test_answers"
        line = "submit -p {answers} -o {tmp}/submission.zip --images {data}/test"
        status, out, error = run(line, answers=answers, data=phantoms)
        assert (status, error) == (0, "")
        assert "submission.zip: 2 masks and subtypes, compared with the images" in out
        with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
            archive.extractall(tmp_path / "handed_in")
        status, out, _ = run("evaluate -p {tmp}/handed_in -r {answers}", answers=answers)
        assert status == 0
        assert out.count("| 1.000 | 1.000 to 1.000 |") == 3
        assert (tmp_path / "handed_in" / "evaluation" / "evaluation.json").is_file()


class TestPrepare:
    def test_from_a_table_without_preprocessing(self, source, run, raw, tmp_path, caplog):
        rows = [f"{name};{name[5]};{split}" for name, split in CASES.items()]
        (tmp_path / "cases.csv").write_text("\n".join(["\ufeffFilename;Subtype;Split", *rows]), encoding="utf-8")
        line = "prepare -i {source} --table {tmp}/cases.csv -d 7 -n P --raw {raw} --no_preprocessing"
        status, out, error = run(line, source=source, raw=raw)
        assert (status, error) == (0, "")
        assert "cases.csv has no row for 1 images" in caplog.text
        assert "Dataset007_P: 2 train, 2 validation, 0 test; 0 masks rounded" in out

    def test_folders_must_be_given(self, source, run, raw, monkeypatch):
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            monkeypatch.delenv(name, raising=False)
        status, _, error = run("prepare -i {source} -d 7 -n P", source=source)
        assert (status, error) == (
            2,
            "nnturbo: nnU-Net's folder must be given as --raw FOLDER or by the environment variable nnUNet_raw\n",
        )
        status, _, error = run("prepare -i {source} -d 7 -n P --raw {raw}", source=source, raw=raw)
        assert status == 2
        assert "--preprocessed FOLDER" in error
        assert not raw.exists()

    def test_says_first_that_nnunet_is_not_installed(self, source, run, raw, monkeypatch):
        monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: None)
        line = "prepare -i {source} -d 7 -n P --raw {raw} --preprocessed {raw}"
        status, _, error = run(line, source=source, raw=raw)
        assert (status, error.count("\n")) == (2, 1)
        assert "pip install 'nnturbo[training]'" in error
        assert not raw.exists()

    def test_the_next_command_names_folders_that_the_environment_does_not(self, source, run, raw, monkeypatch):
        monkeypatch.setattr(planning, "_plan", lambda *_: raw / "Dataset007_P" / "plans" / "P.json")
        monkeypatch.setattr(planning, "_preprocess", lambda *_: (raw / "Dataset007_P" / "plans").mkdir())
        monkeypatch.setattr(planners, "described_network", lambda *_: "as planned")
        line = "prepare -i {source} -d 7 -n P --raw {raw} --preprocessed '{tmp}/a b'"
        status, out, _ = run(line, source=source, raw=raw)
        assert status == 0
        assert out.endswith(
            f"next: nnUNet_raw={raw} nnUNet_preprocessed='{raw.parent}/a b' nnturbo train -d 7 -c 3d_fullres -p P\n"
        )

    def test_a_full_disk_is_noticed_before_preprocessing(self, source, run, raw, monkeypatch):
        assert run("prepare -i {s} -d 7 -n P --raw {raw} --no_preprocessing", s=source, raw=raw)[0] == 0
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
        with pytest.raises(
            planning.OutputError, match=r"preprocessing Dataset007_P needs about .* MB, .* has 0 MB free"
        ):
            planning.plan_and_preprocess(raw / "Dataset007_P", raw.parent / "pre")
        assert not (raw.parent / "pre").exists()


def table_of(text, name="cases.csv"):
    def spoil(source):
        (source.parent / name).write_bytes(text)

    return spoil


def without(find):
    return lambda source: find(source, "quiz_0_001").unlink()


def with_mask(mask, **grid):
    return lambda source: write_image(mask_of(source, "quiz_0_001"), mask, **grid)


def with_other_subtype(source):
    (source / "train" / "subtype0").rename(source / "train" / "subtype3")


def same_case_in_two_splits(source):
    write_image(source / "validation" / "subtype0" / "quiz_0_001_0000.nii.gz", scan(50))
    write_image(source / "validation" / "subtype0" / "quiz_0_001.nii.gz", labels())


def same_voxels_under_another_name(source):
    write_image(image_of(source, "quiz_0_004"), scan(0).astype(np.float32), spacing=(0.5, 0.75, 2.0))


def other_ending(source):
    image = write_image(source / "train" / "subtype0" / "quiz_0_009_0000.nii.gz", scan(9))
    image.rename(image.with_name("quiz_0_009_0000.NII.GZ"))


def link_to_nothing(source):
    (source / "test" / "quiz_008_0000.nii.gz").symlink_to(source / "gone.nii.gz")


ROWS = b"quiz_0_001,0,train\nquiz_1_002,1,train\nquiz_1_003,1,validation\n"
HEADER = b"filename,subtype,split\n"
BAD_SOURCES = {
    "wrong columns": (table_of(b"name,subtype,split\n" + ROWS), "cases.csv: the first line must name the columns"),
    "encoding": (table_of((HEADER + ROWS).decode().encode("utf-16")), "cases.csv: the table cannot be read"),
    "no table": (lambda source: None, "cases.csv: the table cannot be read: No such file"),
    "duplicate row": (table_of(HEADER + ROWS + b"quiz_0_001,0,train\n"), "cases.csv line 5: quiz_0_001 must occur"),
    "leaked row": (table_of(HEADER + ROWS + b"quiz_0_001,0,validation\n"), "cases.csv line 5: quiz_0_001 must occur"),
    "unknown subtype": (table_of(HEADER + ROWS + b"quiz_0_004,3,train\n"), "cases.csv line 5: unknown subtype '3'"),
    "disagreeing subtype": (table_of(HEADER + ROWS + b"quiz_0_004,1,train\n"), "cases.csv line 5: the name quiz_0_004"),
    "unknown split": (table_of(HEADER + ROWS + b"quiz_0_004,0,val\n"), "cases.csv line 5: split must be one of"),
    "missing mask": (without(mask_of), "quiz_0_001_0000.nii.gz: the mask quiz_0_001.nii.gz must lie beside"),
    "missing image": (without(image_of), "quiz_0_001.nii.gz: the image quiz_0_001_0000.nii.gz must lie beside"),
    "label": (with_mask(labels() + 1), "quiz_0_001.nii.gz: labels must be 0, 1 or 2"),
    "shape": (with_mask(labels((5, 6, 8))), "quiz_0_001.nii.gz: shape (z, y, x) is (5, 6, 8)"),
    "spacing": (with_mask(labels(), spacing=(1, 1, 1)), "quiz_0_001.nii.gz: spacing"),
    "subtype folder": (with_other_subtype, "train/subtype3: unknown subtype"),
    "two splits": (same_case_in_two_splits, "validation/subtype0/quiz_0_001_0000.nii.gz: a case must occur once"),
    "same voxels": (same_voxels_under_another_name, "quiz_0_004_0000.nii.gz: leaked, the same scan as"),
    "other ending": (other_ending, "quiz_0_009_0000.NII.GZ: it must lie in"),
    "dangling link": (link_to_nothing, "quiz_008_0000.nii.gz: it must be a file"),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_bad_source_gives_one_line_and_changes_nothing(source, run, raw, kind):
    target = raw / "Dataset007_P"
    target.mkdir(parents=True)
    (target / "mine").write_text("")
    spoil, text = BAD_SOURCES[kind]
    spoil(source)
    table = "" if "cases.csv" not in text else "--table {tmp}/cases.csv"
    line = "prepare -i {source} -d 7 -n P --raw {raw} --no_preprocessing --overwrite "
    status, out, error = run(line + table, source=source, raw=raw)
    assert (status, out) == (2, "")
    assert text in error
    assert error.count("\n") == 1
    assert [path.name for path in raw.rglob("*")] == ["Dataset007_P", "mine"]


@pytest.mark.parametrize("change", ["cut", "xml", "not"])
def test_an_unreadable_xlsx_gives_one_line(source, run, raw, tmp_path, change):
    openpyxl = pytest.importorskip("openpyxl")
    path = tmp_path / "cases.xlsx"
    workbook = openpyxl.Workbook()
    workbook.active.append(["filename", "subtype", "split"])
    workbook.save(path)
    if change == "xml":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content[:-40] if name.endswith("sheet1.xml") else content)
    else:
        path.write_bytes(path.read_bytes()[:900] if change == "cut" else b"PK")
    line = "prepare -i {source} --table {tmp}/cases.xlsx -d 7 -n P --raw {raw} --no_preprocessing"
    status, _, error = run(line, source=source, raw=raw)
    assert (status, error.count("\n")) == (2, 1)
    assert "cases.xlsx: the table cannot be read" in error
    assert not raw.exists()


def test_a_source_that_would_be_replaced_is_refused(source, run, raw, tmp_path):
    assert run("prepare -i {s} -d 7 -n P --raw {raw} --no_preprocessing", s=source, raw=raw)[0] == 0
    before = files_in(raw)
    (tmp_path / "cases.csv").write_bytes(HEADER + ROWS)
    line = "prepare -i {raw}/Dataset007_P --table {tmp}/cases.csv -d 7 -n P --raw {raw} --no_preprocessing --overwrite"
    status, _, error = run(line, raw=raw)
    assert (status, error.count("\n")) == (2, 1)
    assert "which would be replaced" in error
    assert files_in(raw) == before


class TestEvaluate:
    @pytest.fixture
    def predictions(self, source, tmp_path):
        return flat_masks(source / "validation", tmp_path / "predictions")

    def test_missing_predictions_are_named_and_give_status_1(self, source, predictions, run, caplog):
        (predictions / "quiz_0_004.nii.gz").unlink()
        status, out, _ = run("evaluate -p {p} -r {r} --resamples 10", p=predictions, r=source)
        assert status == 1
        assert "1 masks missing, counted as 0: quiz_0_004" in out
        assert "1 masks are missing and count as 0: quiz_0_004" in caplog.text

    def test_missing_rows_are_named_and_give_status_1(self, source, predictions, run):
        (predictions / "subtype_results.csv").write_text("Names,Subtype\nquiz_1_003.nii.gz,1\n")
        status, out, _ = run("evaluate -p {p} -r {r} --resamples 10", p=predictions, r=source)
        assert status == 1
        assert "1 subtypes missing, counted as wrong: quiz_0_004" in out

    @pytest.mark.parametrize(("split", "cases"), [("train", 2), ("all", 4)])
    def test_other_splits(self, source, tmp_path, run, split, cases):
        predictions = flat_masks(source, tmp_path / "all")
        line = f"evaluate -p {{p}} -r {{r}} --split {split} --resamples 10"
        status, out, _ = run(line, p=predictions, r=source)
        assert status == 0
        assert f"| over {cases} cases |" in out

    def test_true_subtypes_from_a_table(self, source, predictions, run, tmp_path):
        (tmp_path / "truth.csv").write_text("Names,Subtype\nquiz_0_004.nii.gz,1\nquiz_1_003.nii.gz,1\n")
        line = "evaluate -p {p} -r {r} --reference_subtypes {tmp}/truth.csv --subtypes {p}/subtype_results.csv"
        status, out, _ = run(line + " --resamples 10", p=predictions, r=source)
        assert status == 0
        assert "| subtype macro-F1 | 0.333 |" in out

    @pytest.mark.parametrize(
        ("spoil", "text"),
        [
            (lambda p: write_image(p / "quiz_0_004.nii.gz", labels((5, 6, 8))), "quiz_0_004: prediction and reference"),
            (lambda p: write_image(p / "quiz_0_004.nii.gz", labels() + 1), "quiz_0_004.nii.gz: labels must be"),
            (lambda p: (p / "subtype_results.csv").write_text("a,b\n"), "the header must be exactly Names,Subtype"),
            (
                lambda p: (p / "subtype_results.csv").write_text("Names,Subtype\nquiz_0_004.nii.gz,7\n"),
                "line 2: the subtype of quiz_0_004.nii.gz must be 0, 1 or 2, got '7'",
            ),
        ],
    )
    def test_a_bad_prediction_gives_one_line_and_changes_nothing(self, source, predictions, run, spoil, text):
        (predictions / "evaluation").mkdir()
        (predictions / "evaluation" / "evaluation.json").write_text("mine")
        spoil(predictions)
        status, out, error = run("evaluate -p {p} -r {r}", p=predictions, r=source)
        assert (status, out, error.count("\n")) == (2, "", 1)
        assert text in error
        assert (predictions / "evaluation" / "evaluation.json").read_text() == "mine"

    def test_a_split_that_nothing_tells_is_refused(self, source, predictions, run):
        line = "evaluate -p {p} -r {r}/validation --split train"
        status, _, error = run(line, p=predictions, r=source)
        assert (status, error.count("\n")) == (2, 1)
        assert "split='train' needs" in error

    @pytest.mark.parametrize(
        ("rows", "text"),
        [
            ("quiz_0_004,0\nquiz_0_004,0\n", "line 3: quiz_0_004 must occur once"),
            ("quiz_0_004,5\n", "line 2: the subtype of quiz_0_004 must be 0, 1 or 2, got '5'"),
        ],
    )
    def test_a_bad_table_of_the_truth(self, source, predictions, run, tmp_path, rows, text):
        (tmp_path / "truth.csv").write_text("case,subtype\n" + rows)
        line = "evaluate -p {p} -r {r} --reference_subtypes {tmp}/truth.csv"
        status, _, error = run(line, p=predictions, r=source)
        assert (status, error.count("\n")) == (2, 1)
        assert text in error


def test_submit_gives_one_line(source, run, tmp_path):
    predictions = flat_masks(source, tmp_path / "predictions")
    (predictions / "subtype_results.csv").unlink()
    status, _, error = run("submit -p {p} -o {tmp}/s.zip", p=predictions)
    assert (status, error.count("\n")) == (2, 1)
    assert "subtype_results.csv: the table cannot be read: No such file" in error
    assert not (tmp_path / "s.zip").exists()


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (PermissionError(13, "Permission denied", "/data/x.nii.gz"), 2, "nnturbo: /data/x.nii.gz: Permission denied\n"),
        (KeyboardInterrupt(), 130, "nnturbo: interrupted; every file that is there is complete\n"),
    ],
)
def test_what_the_system_refuses_gives_one_line(run, monkeypatch, error, status, text):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(phantom, "write_dataset", refuse)
    assert run("phantom -o {tmp}/x") == (status, "", text)


def test_constants_are_those_of_the_library():
    assert choices.PHANTOM_COUNTS == phantom.PANCREAS_COUNTS
    assert choices.PLANNERS == planners.PLANNERS
    assert set(choices.PRESETS) == set(recipe.PRESETS)


def test_importing_is_light():
    heavy = ("torch", "numpy", "nnunetv2", "scipy", "SimpleITK", "matplotlib", "tqdm")
    program = f"import sys, nnturbo.training.cli; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
