"""Tasks unlike the pancreas, from files to an evaluation: nothing but dataset.json and the cases says what they are."""

import csv
import json

import numpy as np
import pytest
from nnturbo.engine.cli import main
from nnturbo.engine.jobs.class_table import write_class_table
from nnturbo.engine.scans.volume import read_volume
from nnturbo.training.data.multi_task_plans import read_classes
from nnturbo.training.data.planning import plan_and_preprocess
from nnturbo.training.data.prepare import prepare_dataset
from nnturbo.training.data.references import find_references
from nnturbo.training.data.tables import read_subtype_results
from nnturbo.training.train import train

from tests.training.second_task import CLASSES, DESCRIPTION, generate, write, write_table, write_task
from tests.training.tiny import CONFIGURATION, TINY, import_nnunet, seed_everything, shrink

REGIONS = {"whole": ["liver", "vessel", "tumour"], "vessel": ["vessel"], "tumour": ["tumour"]}


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second") / "source"
    write_task(folder)
    return folder


class TestPreparing:
    def test_folders_of_classes(self, source, tmp_path):
        dataset = prepare_dataset(source, tmp_path, dataset_id=9, dataset_name="Liver")
        assert dataset.task.class_names == CLASSES
        content = json.loads((dataset.folder / "dataset.json").read_text())
        assert content == {
            **DESCRIPTION,
            "name": "Dataset009_Liver",
            "numTraining": 12,
            "class_names": list(CLASSES),
        }
        images = sorted(path.name for path in (dataset.folder / "imagesTr").iterdir())
        assert len(images) == 24
        assert images[:2] == ["t_adenoma_0_0000.nrrd", "t_adenoma_0_0001.nrrd"]
        rows = rows_of(dataset.folder / "classification_labels.csv")
        assert {row["case"]: row["subtype"] for row in rows}["v_primary_0"] == "primary"
        assert len(list((dataset.folder / "imagesVal").iterdir())) == 8

    def test_a_table_says_the_same(self, source, tmp_path):
        table = write_table(source, tmp_path / "cases.csv")
        by_table = prepare_dataset(source, tmp_path / "a", dataset_id=9, dataset_name="Liver", table=table)
        by_folders = prepare_dataset(source, tmp_path / "b", dataset_id=9, dataset_name="Liver")
        for name in ("dataset.json", "splits_final.json", "classification_labels.csv"):
            assert (by_table.folder / name).read_text() == (by_folders.folder / name).read_text()

    @pytest.mark.parametrize("by_table", [False, True])
    @pytest.mark.parametrize(
        "names",
        [
            ("-1", "0", "1"),
            ("01", "02"),
            ("1", "2", "2a"),
            ("a, b", 'the "c"'),
            ("10", "1_0", "1e1"),
            ("nan", "type 2"),
        ],
        ids=str,
    )
    def test_classes_of_any_name_come_back(self, tmp_path, names, by_table):
        source, classes = tmp_path / "source", {}
        (source).mkdir()
        (source / "dataset.json").write_text(json.dumps(DESCRIPTION))
        for number, (split, label) in enumerate((split, label) for split in ("train", "validation") for label in names):
            case = f"case {number}"
            channels, mask = generate(number, CLASSES[0])
            (source / split / label).mkdir(parents=True)
            for channel, voxels in enumerate(channels):
                write(source / split / label / f"{case}_{channel:04d}.nrrd", voxels)
            write(source / split / label / f"{case}.nrrd", mask)
            classes[case] = label
        table = write_table(source, tmp_path / "cases.csv") if by_table else None
        dataset = prepare_dataset(source, tmp_path / "raw", dataset_id=9, dataset_name="Liver", table=table)
        assert dataset.task.class_names == names
        found, trained = read_classes(dataset.folder / "classification_labels.csv")
        assert trained == names
        assert {case: trained[label] for case, label in found.items()} == classes
        assert find_references(dataset.folder).subtypes == classes
        answers = {f"{case}.nrrd": (label, np.eye(len(names))[label]) for case, label in found.items()}
        write_class_table(tmp_path / "subtype_results.csv", answers, names, with_probabilities=True)
        read = read_subtype_results(tmp_path / "subtype_results.csv", class_names=names, file_ending=".nrrd")
        assert read.subtypes == classes

    def test_regions(self, source, tmp_path):
        folder = prepare_dataset(source, tmp_path, dataset_id=9, dataset_name="Liver", regions=REGIONS).folder
        content = json.loads((folder / "dataset.json").read_text())
        assert content["labels"] == {"background": 0, "whole": [1, 2, 3], "vessel": [2], "tumour": [3]}
        assert content["regions_class_order"] == [1, 2, 3]
        mask = read_volume(folder / "labelsTr" / "t_cyst_1.nrrd").array[0]
        np.testing.assert_array_equal(mask, read_volume(source / "train" / "cyst" / "t_cyst_1.nrrd").array[0])

    def test_regions_of_the_pancreas_are_those_of_the_task(self, tmp_path):
        from nnturbo.training.data.task import PANCREAS

        task = PANCREAS.with_regions({"pancreas": ["pancreas", "lesion"], "lesion": ["lesion"]})
        assert task.describe()["labels"] == {"background": 0, "pancreas": [1, 2], "lesion": [2]}
        assert task.structures == PANCREAS.structures == {"whole": (1, 2), "lesion": (2,)}
        assert task.is_pancreas

    @pytest.mark.parametrize(
        ("regions", "said"),
        [
            ({"whole": ["liver", "bone"]}, "regions must consist of the labels liver, vessel, tumour, got bone"),
            ({"tumour": ["tumour"], "whole": ["liver", "vessel", "tumour"]}, "tumour has 0: give larger regions first"),
            ({"whole": ["liver", "vessel", "tumour"], "tumour": ["tumour"]}, "whole has 2: give larger regions first"),
            ({"vessel": ["vessel"]}, "must be painted by a region; these are not: liver, tumour"),
        ],
    )
    def test_regions_that_say_too_little(self, source, tmp_path, regions, said):
        with pytest.raises(ValueError, match=said):
            prepare_dataset(source, tmp_path / "raw", dataset_id=9, dataset_name="L", regions=regions)
        assert not (tmp_path / "raw").exists()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"file_ending": ".mhd"}, r"file_ending must be one of .*, got '\.mhd'"),
            ({"labels": {"background": 0, "liver": 1, "tumour": 3}}, "labels must be numbered 0, 1, 2, "),
            ({"labels": {"liver": 1}}, "labels must have 'background': 0"),
            ({"class_names": ["cyst"]}, "class_names must be a list of two or more different names"),
            ({"channel_names": {}}, "channel_names must name at least one channel"),
            ({"channel_names": ["T1", "T2"]}, "as nnU-Net's dataset.json: "),
            ({"file_ending": ".nii.gz"}, r"under a name that ends with \.nii\.gz"),
            ({"channel_names": {"0": "T1", "1": "T2", "2": "DWI"}}, r"the image t_cyst_0_0002\.nrrd must lie beside"),
            ({"channel_names": {"0": "T1"}}, r"the image t_cyst_0_0001_0000\.nrrd must lie beside the mask"),
            (
                {"class_names": ["adenoma", "cyst", "primary"]},
                "metastasis: unknown subtype; .* adenoma, cyst and primary",
            ),
        ],
    )
    def test_a_description_that_does_not_fit(self, source, tmp_path, change, said):
        (tmp_path / "d.json").write_text(json.dumps(DESCRIPTION | change))
        with pytest.raises(Exception, match=said) as caught:
            prepare_dataset(
                source, tmp_path / "raw", dataset_id=9, dataset_name="Liver", description=tmp_path / "d.json"
            )
        assert type(caught.value).__name__ == "DatasetError"
        assert not (tmp_path / "raw").exists()

    def test_the_command(self, source, tmp_path, capsys):
        line = ["prepare", "-i", source, "-d", "9", "-n", "Liver", "--raw", tmp_path / "raw", "--no_preprocessing"]
        regions = ["--regions", "whole=liver,vessel,tumour", "vessel=vessel", "tumour=tumour", "--folds", "2"]
        assert main([*map(str, line), *regions]) == 0
        said = capsys.readouterr().out
        assert "classes: adenoma, cyst, metastasis, primary; labels: whole, vessel, tumour\n" in said
        assert "folds 0 to 1 of the training cases; split 2 is the given one\n" in said
        assert main([*map(str, line), "--overwrite", "--regions", "whole"]) == 2
        assert "--regions must be different NAME=LABEL,LABEL, got 'whole'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(source, tmp_path_factory, nnunet):
    """Regions of the second task, trained for two epochs; gives the folder of the data and the model folder."""
    import_nnunet()
    folder = tmp_path_factory.mktemp("trained_second")
    with pytest.MonkeyPatch.context() as patch:
        from tests.training.tiny import work_in_threads

        work_in_threads(patch)
        extractor = nnunet.DatasetFingerprintExtractor
        collect = extractor.collect_foreground_intensities
        few = staticmethod(lambda labels, images, num_samples: collect(labels, images, num_samples=500))
        patch.setattr(extractor, "collect_foreground_intensities", few)
        patch.setenv("nnUNet_n_proc_DA", "0")
        prepared = prepare_dataset(source, folder / "raw", dataset_id=9, dataset_name="Liver", regions=REGIONS)
        plans_file = plan_and_preprocess(prepared.folder, folder / "preprocessed", planner="compact", processes=1)
        plans = json.loads(plans_file.read_text())
        shrink(plans["configurations"][CONFIGURATION])
        plans_file.write_text(json.dumps(plans))
        seed_everything(0)
        recipe = TINY.parse({**TINY.describe(), "focus_labels": ["tumour"]})
        model = train(
            prepared.folder.name, CONFIGURATION, 0, recipe=recipe, plans_name=plans_file.stem, device="cpu",
            **{name: folder / name for name in ("raw", "preprocessed", "results")},
        )  # fmt: skip
    return prepared.folder, model


class TestTheWholePath:
    def test_training_finds_channels_regions_and_classes(self, model):
        _, trained = model
        plans = json.loads((trained / "plans.json").read_text())
        arguments = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
        assert arguments["head"]["class_names"] == list(CLASSES)
        assert (arguments["head"]["regions"], arguments["head"]["focus_channels"]) == (True, [2])
        history = rows_of(trained / "fold_0" / "history.csv")[0]
        assert {"dsc_1", "dsc_2", "dsc_3", "macro_f1"} <= set(history)

    def test_predictions_are_evaluated_by_structure_and_class(self, model, source, tmp_path, capsys):
        folder, trained = model
        line = [
            "predict",
            "-i",
            folder / "imagesVal",
            "-o",
            tmp_path / "out",
            "-m",
            trained,
            "-f",
            "0",
            "--disable_tta",
        ]
        assert main([*map(str, line), "-device", "cpu"]) == 0
        rows = rows_of(tmp_path / "out" / "subtype_results.csv")
        assert [row["Names"] for row in rows] == [f"v_{name}_0.nrrd" for name in CLASSES]
        for references, structures in ((folder, REGIONS), (source, ["whole", "liver", "vessel", "tumour"])):
            capsys.readouterr()
            assert main(["evaluate", "-p", str(tmp_path / "out"), "-r", str(references)]) == 0
            table = capsys.readouterr().out
            for measure in (*(f"{name} DSC" for name in structures), "subtype macro-F1"):
                assert f"\n| {measure} | " in table
            found = json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())
            assert list(found["structures"]) == list(structures)
            assert found["subtypes"]["class_names"] == list(CLASSES)
            assert [case["subtype"] for case in found["cases"]] == list(CLASSES)
            predicted = [CLASSES[int(row["Subtype"])] for row in rows]
            assert [case["predicted_subtype"] for case in found["cases"]] == predicted
            assert {row["target"] for row in found["comparison"]} == {None}
