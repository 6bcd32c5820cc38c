"""The page of a job, looked at by a browser."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine import VolumeError
from nnturbo.engine.cli import main
from nnturbo.engine.files import write_json
from nnturbo.engine.jobs.case_record import DONE, FAILED, Record
from nnturbo.engine.jobs.records import RecordFolder
from nnturbo.engine.jobs.report import write_report
from nnturbo.engine.model.classification import Classification

from tests.engine.factory import dataset_json, plans_2d, plans_json, smooth_scan, write_model, write_scan

pytest.importorskip("PIL", reason="needs Pillow")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def output(tmp_path):
    """What a job leaves: two cases with a pancreas and two lesions, the larger one low in the scan; one that failed."""
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "dataset.json", dataset_json())
    write_json(out / "plans.json", {"image_reader_writer": "SimpleITKIO"})
    record_folder = RecordFolder(output=out, file_ending=".nii.gz", class_names=("low", "high"))
    record_folder.begin()
    labels = np.zeros((40, 60, 70), np.uint8)
    labels[5:30, 20:40, 20:50] = 1
    labels[7:12, 22:30, 24:34] = 2
    labels[25:27, 32:34, 40:42] = 2
    for name, volume in (("a", 3.5), ("b", 12.25)):
        for path, array in (
            (tmp_path / f"{name}_0000.nii.gz", smooth_scan(labels.shape)),
            (out / f"{name}.nii.gz", labels),
        ):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((1.5, 1.5, 3.0))
            sitk.WriteImage(image, str(path))
        record_folder.write(Record(
            name=name, status=DONE, images=(str(tmp_path / f"{name}_0000.nii.gz"),),
            volumes_ml={"pancreas": volume, "lesion": 20 - volume}, timings_ms={"read": 100.0, "network": 900.0},
            warnings=("a <b>slice</b> is missing",) if name == "a" else (),
            classification=Classification(
                label=1, name="high", probabilities=(0.25, 0.75), logits=(0.0, 1.0), class_names=("low", "high")
            ),
        ))  # fmt: skip
    record_folder.write(Record(name="c", status=FAILED, error="c_0000.nii.gz: cut off </script>"))
    return out


def contents(page):
    found = re.findall(r'<script type="application/json" id="case-\d+">(.*?)</script>', page.read_text(), re.DOTALL)
    return [json.loads(text) for text in found]


@pytest.mark.parametrize(("kind", "planes"), [("sheared", 3), ("2D", 1)])
def test_scans_are_shown_as_their_model_reads_them(tmp_path, kind, planes):
    nibabel = pytest.importorskip("nibabel", reason="writes sheared scans")
    (tmp_path / "in").mkdir()
    array = smooth_scan((8, 14, 16)).T
    affine = np.diag([-1.5, -1.5, 2.0, 1.0])
    if kind == "2D":
        model = write_model(tmp_path / "m", plans=plans_2d())
        array = array[..., 3]
    else:
        model = write_model(tmp_path / "m", plans={**plans_json(), "image_reader_writer": "NibabelIO"})
        affine[0, 1] = 0.05
    image = nibabel.Nifti1Image(array, affine)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "in" / "a_0000.nii.gz")
    call = ["predict", "-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "-device", "cpu", "--report"]
    assert main([str(part) for part in [*call, "--backend", "torch", "--disable_progress_bar"]]) == 0
    (case,) = contents(tmp_path / "out" / "report.html")
    assert "no pictures" not in case["note"]
    assert len(case["planes"]) == planes


def test_the_page_has_a_row_for_every_case_and_pictures_of_those_that_are_done(output, tmp_path):
    page = tmp_path / "report.html"
    write_report(output, page)
    text = page.read_text()
    assert text.count("data-case=") == 3
    assert "http://" not in text
    assert "https://" not in text
    assert "a &lt;b&gt;slice&lt;/b&gt; is missing" in text
    assert "cut off &lt;/script&gt;" in text
    cases = contents(page)
    assert [case["name"] for case in cases] == ["a", "b"]
    assert cases[0]["labels"] == ["pancreas 3.5 ml", "lesion 16.5 ml"]
    for plane in cases[0]["planes"]:
        assert plane["at_mm"][plane["start"]] == 0
        assert plane["slices"] <= 24
    assert page.stat().st_size < 2 * 1_500_000


def test_the_first_slice_shown_goes_through_the_largest_lesion(output, tmp_path):
    import base64
    import io

    from PIL import Image

    write_report(output, tmp_path / "report.html", only="a")
    (case,) = contents(tmp_path / "report.html")
    for plane, size in zip(case["planes"], ([10, 8], [10, 5], [8, 5]), strict=True):
        strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(plane["mask"].partition(",")[2]))))
        height = plane["size"][1]
        shown = strip[plane["start"] * height : (plane["start"] + 1) * height]
        assert set(np.unique(strip)) == {0, 1, 2}
        # The lesion's extent in mm, in pixels that are square.
        rows, columns = np.nonzero(shown == 2)
        ratio = (np.ptp(columns) + 1) / (np.ptp(rows) + 1)
        expected = size[0] * 1.5 / (size[1] * (1.5 if plane["name"] == "axial" else 3.0))
        assert ratio == pytest.approx(expected, rel=0.15)


def test_without_labels_the_middle_is_shown_and_said(output, tmp_path):
    image = sitk.ReadImage(str(output / "a.nii.gz"))
    sitk.WriteImage(image * 0, str(output / "a.nii.gz"))
    write_report(output, tmp_path / "report.html", only="a")
    (case,) = contents(tmp_path / "report.html")
    assert "no label was found" in case["note"]
    assert case["labels"] == []
    assert len(case["planes"]) == 3


def test_a_scan_that_is_gone_leaves_its_row(output, tmp_path):
    (tmp_path / "a_0000.nii.gz").unlink()
    write_report(output, tmp_path / "report.html")
    first, second = contents(tmp_path / "report.html")
    assert "no pictures" in first["note"]
    assert first["planes"] == []
    assert len(second["planes"]) == 3


def test_what_is_no_output_folder_is_refused(tmp_path, output):
    with pytest.raises(VolumeError, match="must be where nnturbo predict wrote"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(VolumeError, match="no record of d"):
        write_report(output, tmp_path / "report.html", only="d")


def test_view_writes_the_page_of_one_case(output, tmp_path, capsys):
    assert main(["view", str(output), "b", "-o", str(tmp_path / "b.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'b.html'}\n"
    assert [case["name"] for case in contents(tmp_path / "b.html")] == ["b"]
    assert main(["view", str(output), "d", "-o", str(tmp_path / "d.html")]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_it_sorts_and_slides(output, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    page = tmp_path / "report.html"
    write_report(output, page)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        errors = []
        tab.on("pageerror", lambda error: errors.append(error))
        tab.on("request", lambda request: errors.append(request.url) if request.url[:4] == "http" else None)
        tab.goto(page.as_uri())
        tab.wait_for_selector("canvas")
        names = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent).join('')"
        assert tab.evaluate(names) == "abc"
        tab.get_by_text("pancreas, ml").click()
        assert tab.evaluate(names) == "cab"
        tab.get_by_text("pancreas, ml").click()
        assert tab.evaluate(names) == "bac"
        colours = "[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 400, 400).data].join()"
        outlined = tab.evaluate(colours)
        tab.get_by_label("outlines").click()
        plain = tab.evaluate(colours)
        assert plain != outlined
        slider = tab.get_by_label("slice, axial")
        before = tab.locator("figcaption").first.inner_text()
        slider.press("ArrowRight")
        tab.get_by_label("outlines").click()
        assert tab.locator("figcaption").first.inner_text() != before
        tab.locator("tbody tr", has_text="failed").click()
        assert tab.locator("#case").is_hidden()
        assert errors == []
        browser.close()


class TestWithTheJob:
    @pytest.fixture
    def command(self, tmp_path):
        model = write_model(tmp_path / "model")
        (tmp_path / "scans").mkdir()
        for index, name in enumerate("ab"):
            write_scan(tmp_path / "scans" / f"{name}_0000.nii.gz", index)
        given = ["-m", str(model), "-i", str(tmp_path / "scans"), "-o", str(tmp_path / "job"), "--disable_tta"]
        return ["predict", *given, "-device", "cpu", "--backend", "torch", "--report", "--disable_progress_bar"]

    def test_the_page_is_beside_the_labels(self, command, tmp_path):
        assert main(command) == 0
        assert "2 cases done" in (tmp_path / "job" / "report.html").read_text()

    def test_a_part_without_cases_has_a_page_without_cases(self, command, tmp_path):
        assert main([*command, "-num_parts", "3", "-part_id", "2"]) == 0
        assert "0 cases done" in (tmp_path / "job" / "report.html").read_text()

    def test_how_the_job_went_is_said_where_there_is_no_page(self, command, tmp_path, capsys):
        (tmp_path / "job" / "report.html").mkdir(parents=True)
        assert main(command) == 1
        said = capsys.readouterr()
        assert "2 done" in said.out
        assert "no report: " in said.err

    def test_without_pillow_the_job_does_not_begin(self, command, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        assert main(command) == 2
        assert "nnturbo[report]" in capsys.readouterr().err
        assert not (tmp_path / "job").exists()
