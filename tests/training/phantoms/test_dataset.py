"""Data sets of phantoms: names, files, counts, and what leaves a folder as it is."""

import itertools
import logging

import numpy as np
import pytest
import SimpleITK as sitk
from nnturbo.engine.errors import OutputError
from nnturbo.training.phantoms import phantom as module
from nnturbo.training.phantoms.phantom import (
    DEFAULT_SETTINGS,
    PANCREAS_COUNTS,
    SMALL_SETTINGS,
    case_seed,
    draw_geometry,
    generate_phantom,
    write_dataset,
)

COUNTS = {"train": 3, "validation": 1, "test": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    steps = []
    cases = write_dataset(
        folder,
        counts=COUNTS,
        seed=5,
        settings=SMALL_SETTINGS,
        answers=True,
        scaled_mask_share=0.5,
        progress=lambda *step: steps.append(step),
    )
    return folder, cases, steps


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class TestDataset:
    def test_folders_and_names(self, written):
        folder, cases, _ = written
        labelled = [
            f"{case.split}/subtype{case.subtype}/quiz_{case.subtype}_{number}{ending}"
            for case, number in zip(cases[:4], ("001", "004", "007", "002"), strict=True)
            for ending in (".nii.gz", "_0000.nii.gz")
        ]
        unlabelled = [f"test/quiz_{number}_0000.nii.gz" for number in ("003", "006")]
        answers = [f"test_answers/{name}" for name in ("quiz_003.nii.gz", "quiz_006.nii.gz", "subtype_results.csv")]
        assert files_in(folder) == sorted([*labelled, *unlabelled, *answers])

    def test_files_hold_the_phantoms(self, written):
        _, cases, _ = written
        origins = set()
        for case in cases:
            phantom = generate_phantom(case.seed, subtype=case.subtype, settings=SMALL_SETTINGS)
            image, mask = sitk.ReadImage(str(case.image)), sitk.ReadImage(str(case.mask))
            assert np.array_equal(sitk.GetArrayFromImage(image), phantom.image)
            assert np.array_equal(np.rint(sitk.GetArrayFromImage(mask)), phantom.mask)
            assert image.GetSpacing() == pytest.approx(phantom.spacing[::-1], rel=1e-6)
            assert image.GetOrigin() == mask.GetOrigin()
            assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
            origins.add(image.GetOrigin())
        assert len(origins) == len(cases)

    def test_some_masks_are_scaled(self, written):
        _, cases, _ = written
        values = {
            case.image.name: [f"{value:.7f}" for value in np.unique(sitk.GetArrayFromImage(sitk.ReadImage(case.mask)))]
            for case in cases
        }
        scaled = [case for case in cases if values[case.image.name] == ["0.0000000", "1.0000153", "2.0000305"]]
        whole = [case for case in cases if values[case.image.name] == ["0.0000000", "1.0000000", "2.0000000"]]
        assert len(scaled) + len(whole) == len(cases)
        assert 0 < len(scaled) < 4
        assert all(case.split != "test" for case in scaled)
        assert all(sitk.ReadImage(case.mask).GetPixelID() == sitk.sitkFloat64 for case in scaled)

    def test_answers(self, written):
        folder, cases, _ = written
        rows = (folder / "test_answers/subtype_results.csv").read_text().splitlines()
        expected = [f"quiz_{n}.nii.gz,{c.subtype}" for n, c in zip(("003", "006"), cases[4:], strict=True)]
        assert rows == ["Names,Subtype", *expected]

    def test_progress(self, written):
        _, cases, steps = written
        assert steps == [(done, len(cases), case.image) for done, case in enumerate(cases, start=1)]

    def test_larger_set_contains_the_smaller(self, written, tmp_path):
        _, cases, _ = written
        few = list(module._plan(tmp_path, COUNTS, 5, SMALL_SETTINGS, False))
        many = list(module._plan(tmp_path, PANCREAS_COUNTS, 5, SMALL_SETTINGS, False))
        assert set(few) <= set(many)
        assert [case.seed for case in few] == [case.seed for case in cases]
        assert few[-1].mask is None

    def test_full_set_has_the_real_set_s_counts(self, tmp_path):
        cases = list(module._plan(tmp_path, PANCREAS_COUNTS, 0, DEFAULT_SETTINGS, True))
        counts = {
            split: [sum(case.split == split and case.subtype == s for case in cases) for s in range(3)]
            for split in PANCREAS_COUNTS
        }
        assert counts["train"] == [62, 106, 84]
        assert counts["validation"] == [9, 15, 12]
        assert sum(counts["test"]) == 72
        assert len({case.seed for case in cases}) == len({case.image.name for case in cases}) == 360

    def test_any_first_cases_are_balanced(self):
        given = list(module._balanced_subtypes(252, DEFAULT_SETTINGS))
        for count, subtype in itertools.product(range(1, 253), range(3)):
            expected = count * (62, 106, 84)[subtype] / 252
            assert abs(given[:count].count(subtype) - expected) < 1.01

    def test_case_seed_depends_on_each_argument(self):
        seeds = [case_seed(*key) for key in itertools.product((0, 1), ("train", "test"), range(20))]
        assert len(set(seeds)) == len(seeds)

    def test_existing_files_stay(self, tmp_path):
        arguments = {"counts": {"train": 1}, "settings": SMALL_SETTINGS, "scaled_mask_share": 0}
        (case,) = write_dataset(tmp_path, **arguments)
        case.image.unlink()
        case.mask.write_bytes(b"mine")
        with pytest.raises(OutputError, match="1 of 2 files exist"):
            write_dataset(tmp_path, **arguments)
        assert case.mask.read_bytes() == b"mine"
        assert not case.image.exists()
        write_dataset(tmp_path, **arguments, overwrite=True)
        assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(case.mask)))) == {0, 1, 2}
        assert case.image.exists()

    def test_two_sets_are_not_mixed(self, tmp_path):
        arguments = {"settings": SMALL_SETTINGS, "overwrite": True}
        write_dataset(tmp_path, counts={"train": 2}, **arguments)
        before = files_in(tmp_path)
        with pytest.raises(OutputError, match=r"2 other files lie in the folders, the first is .*quiz_._004"):
            write_dataset(tmp_path, counts={"train": 1}, seed=1, **arguments)
        assert files_in(tmp_path) == before
        write_dataset(tmp_path, counts={"validation": 1}, **arguments)
        assert len(files_in(tmp_path)) == len(before) + 2

    @pytest.mark.parametrize("error", [RuntimeError("disk gone"), KeyboardInterrupt()])
    def test_interruption_leaves_whole_files_only(self, tmp_path, monkeypatch, error):
        write = sitk.WriteImage
        written = []

        def fail_at_third(image, name, *rest):
            if len(written) == 2:
                with open(name, "wb") as file:
                    file.write(b"half")
                raise error
            write(image, name, *rest)
            written.append(name)

        monkeypatch.setattr(module.sitk, "WriteImage", fail_at_third)
        with pytest.raises(OutputError if isinstance(error, RuntimeError) else KeyboardInterrupt):
            write_dataset(tmp_path, counts={"train": 2}, settings=SMALL_SETTINGS)
        left = files_in(tmp_path)
        assert len(left) == 2
        assert all("quiz_" in name and sitk.ReadImage(str(tmp_path / name)).GetSize() for name in left)

    def test_full_disk_is_noticed_first(self, tmp_path, monkeypatch):
        usage = module.shutil.disk_usage(tmp_path)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
        with pytest.raises(OutputError, match=r"5 phantoms need about \d+ MB, .* has 1 MB free"):
            write_dataset(tmp_path / "new", counts={"train": 5}, settings=SMALL_SETTINGS)
        assert not (tmp_path / "new").exists()

    def test_room_asked_for_suffices(self, written):
        folder, cases, _ = written
        voxels = sum(np.prod(draw_geometry(case.seed, SMALL_SETTINGS).shape) for case in cases)
        used = sum((folder / name).stat().st_size for name in files_in(folder))
        assert 0.6 < used / (voxels * module.BYTES_PER_VOXEL) < 1

    def test_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be made"):
            write_dataset(tmp_path / "file", counts={"train": 1}, settings=SMALL_SETTINGS)

    def test_processes_write_the_same(self, written, tmp_path):
        folder, cases, _ = written
        steps = []
        arguments = {"counts": COUNTS, "seed": 5, "settings": SMALL_SETTINGS, "scaled_mask_share": 0.5}
        write_dataset(tmp_path, **arguments, workers=2, progress=lambda *step: steps.append(step))
        assert [step[0] for step in steps] == list(range(1, len(cases) + 1))
        for name in files_in(tmp_path):
            assert np.array_equal(*(sitk.GetArrayFromImage(sitk.ReadImage(top / name)) for top in (tmp_path, folder)))

    @pytest.mark.thorough
    def test_failure_in_a_process_is_raised(self, tmp_path):
        counts = {"train": 2}
        first, _ = module._plan(tmp_path, counts, 0, SMALL_SETTINGS, False)
        first.image.mkdir(parents=True)
        with pytest.raises(OutputError, match=r"quiz_._001_0000\.nii\.gz cannot be written"):
            write_dataset(tmp_path, counts=counts, settings=SMALL_SETTINGS, workers=2, overwrite=True)

    def test_logs_and_prints_nothing(self, tmp_path, caplog, capsys):
        with caplog.at_level(logging.DEBUG, logger=module.logger.name):
            write_dataset(tmp_path, counts={"test": 1}, settings=SMALL_SETTINGS)
        assert caplog.messages[0] == f"Writing 1 phantoms to {tmp_path}"
        assert caplog.messages[1].startswith("1 of 1: ")
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"counts": {"training": 1}}, "counts must name splits"),
            ({"counts": {"train": -1}}, "counts must be non-negative"),
            ({"counts": {"train": 0}}, "positive sum"),
            ({"counts": {"train": 1.5}}, "counts must be non-negative integers"),
            ({"scaled_mask_share": 1.5}, "scaled_mask_share must lie in 0 to 1"),
            ({"workers": 0}, "workers must be at least 1"),
            ({"seed": -1}, "seed must be a non-negative integer"),
        ],
    )
    def test_refuses_bad_arguments(self, tmp_path, change, text):
        with pytest.raises(ValueError, match=text):
            write_dataset(tmp_path, **({"counts": {"train": 1}} | change))
