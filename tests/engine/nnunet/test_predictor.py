"""nnU-Net's predictor and ours, side by side: the same calls, the same results."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnturbo.engine import EngineError
from nnturbo.engine.nnunet import nnUNetPredictor
from nnturbo.engine.nnunet.cases import Cases, lists_of_folder
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as StockPredictor
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from tests.engine.factory import smooth_scan
from tests.engine.nnunet.predictors import (
    SHAPE,
    SPACING,
    both,
    check_labels,
    check_numbers,
    load,
    quiet,
    write_model,
    write_scan,
)
from tests.parity.catalogue import CASCADE, PLAIN_2D, PLAIN_CT, REGION_KIND


def test_cases_of_a_folder_are_nnunets(tmp_path):
    for name in ("b_0001.nii.gz", "b_0000.nii.gz", "a_0000.nii.gz", "c_x_0000.nii.gz", "d_0000.nrrd", "odd.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "e_0000.nii.gz").mkdir()
    stock = create_lists_from_splitted_dataset_folder(str(tmp_path), ".nii.gz")
    assert [len(files) for files in stock] == [0, 1, 2, 1]  # odd has no channel
    assert lists_of_folder(str(tmp_path), ".nii.gz") == stock


def test_it_is_a_predictor_of_nnunets(predictors):
    assert isinstance(predictors[0], StockPredictor)


class TestArrays:
    @pytest.mark.parametrize(
        "extra",
        [
            (),
            (None, None, False),
            *(pytest.param(extra, marks=pytest.mark.thorough) for extra in ((None,), (None, None))),
        ],
    )
    def test_one_array(self, predictors, image, extra):
        ours, stock = both(predictors, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}, *extra))
        check_labels(ours, stock)

    def test_with_probabilities(self, predictors, image):
        properties = {"spacing": list(SPACING)}
        ours, stock = both(
            predictors,
            lambda each: each.predict_single_npy_array(image, dict(properties), None, None, True),
        )
        assert type(ours) is type(stock) is tuple
        check_labels(ours[0], stock[0])
        check_numbers(ours[1], stock[1])

    def test_properties_get_what_nnunet_adds(self, predictors, image):
        found = []
        for predictor in predictors:
            found.append({"spacing": SPACING})
            with quiet():
                predictor.predict_single_npy_array(image, found[-1])
        assert found[0].keys() == found[1].keys()
        for name in found[0]:
            assert np.array_equal(found[0][name], found[1][name])

    def test_a_list_and_one_by_itself(self, predictors, image):
        images = [image, smooth_scan((9, 20, 22), 1)[None].astype(np.float32)]
        properties = [{"spacing": SPACING}, {"spacing": (2.0, 1.5, 1.5)}]
        ours, stock = both(
            predictors,
            lambda each: each.predict_from_list_of_npy_arrays(
                images, None, [dict(one) for one in properties], None, 1, num_processes_segmentation_export=1
            ),
        )
        for pair in zip(ours, stock, strict=True):
            check_labels(*pair)
        ours, stock = both(
            predictors,
            lambda each: each.predict_from_list_of_npy_arrays(image, None, {"spacing": SPACING}, None, 1, True, 1),
        )
        check_labels(ours[0][0], stock[0][0])

    def test_without_any_worker(self, predictors, image):
        (labels,) = predictors[0].predict_from_list_of_npy_arrays(image, None, {"spacing": SPACING}, None, 0, False, 0)
        check_labels(labels, predictors[0].predict_single_npy_array(image, {"spacing": SPACING}))

    def test_results_in_files(self, predictors, image, tmp_path):
        reader = predictors[1].plans_manager.image_reader_writer_class()
        write_scan(tmp_path / "in.nii.gz")
        data, properties = reader.read_images([str(tmp_path / "in.nii.gz")])
        for name, predictor in zip(("ours", "stock"), predictors, strict=True):
            with quiet():
                answer = predictor.predict_single_npy_array(data, dict(properties), None, str(tmp_path / name), True)
            assert answer is None
        same_files(tmp_path / "ours", tmp_path / "stock")

    @pytest.mark.parametrize("bad", [{}, {"spacing": (0, 1, 1)}])
    def test_bad_properties(self, predictors, image, bad):
        with pytest.raises((ValueError, EngineError), match="spacing"):
            predictors[0].predict_single_npy_array(image, bad)

    def test_channels_that_are_missing(self, predictors, image):
        with pytest.raises(EngineError, match=r"an image must have 1 channels, \(C, Z, Y, X\), got shape \(2, "):
            predictors[0].predict_single_npy_array(np.concatenate([image, image]), {"spacing": SPACING})


def same_files(ours, stock):
    """Compare labels, probabilities and properties of two results, named by their path without ending."""
    images = [sitk.ReadImage(f"{path}.nii.gz") for path in (ours, stock)]
    check_labels(*map(sitk.GetArrayFromImage, images))
    assert images[0].GetOrigin() == images[1].GetOrigin()
    assert images[0].GetSpacing() == images[1].GetSpacing()
    arrays = [np.load(f"{path}.npz")["probabilities"] for path in (ours, stock)]
    check_numbers(*arrays)
    properties = [pickle.loads(path.with_name(f"{path.name}.pkl").read_bytes()) for path in (ours, stock)]
    assert properties[0].keys() == properties[1].keys()
    assert properties[0]["sitk_stuff"] == properties[1]["sitk_stuff"]
    for name in properties[0].keys() - {"sitk_stuff"}:
        assert np.array_equal(properties[0][name], properties[1][name])


class TestFiles:
    @pytest.mark.parametrize("sequential", [False, True])
    def test_a_folder(self, predictors, scans, tmp_path, sequential):
        for name, predictor in zip(("ours", "stock"), predictors, strict=True):
            (tmp_path / name).mkdir()
            with quiet():
                if sequential:
                    answer = predictor.predict_from_files_sequential(str(scans), str(tmp_path / name), True)
                else:
                    answer = predictor.predict_from_files(
                        str(scans), str(tmp_path / name), save_probabilities=True, num_processes_preprocessing=1,
                        num_processes_segmentation_export=1,
                    )  # fmt: skip
            assert answer == ([] if sequential else [None, None])
        files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("ours", "stock")]
        assert files[0] == files[1]
        for case in "ab":
            same_files(tmp_path / "ours" / case, tmp_path / "stock" / case)
        for name in ("dataset.json", "plans.json"):
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
        calls = [
            json.loads((tmp_path / name / "predict_from_raw_data_args.json").read_text()) for name in ("ours", "stock")
        ]
        assert calls[0] == {**calls[1], "output_folder_or_list_of_truncated_output_files": str(tmp_path / "ours")}

    def test_lists_and_answers_in_memory(self, predictors, scans):
        lists = [[str(scans / "b_0000.nii.gz")], [str(scans / "a_0000.nii.gz")]]
        ours, stock = both(predictors, lambda each: each.predict_from_files(lists, None, False, True, 1, 1))
        for pair in zip(ours, stock, strict=True):
            check_labels(*pair)
        ours, stock = both(predictors, lambda each: each.predict_from_files_sequential(lists, None))
        for pair in zip(ours, stock, strict=True):
            check_labels(*pair)

    def test_lists_to_named_files_in_parts(self, predictors, scans, tmp_path):
        lists = [[str(scans / "a_0000.nii.gz")], [str(scans / "b_0000.nii.gz")]]
        outputs = [str(tmp_path / "one"), str(tmp_path / "two")]
        with quiet():
            predictors[0].predict_from_files(lists, outputs, num_parts=2, part_id=1)
        assert not (tmp_path / "one.nii.gz").exists()
        assert (tmp_path / "two.nii.gz").exists()
        with pytest.raises(ValueError, match="part_id must be below num_parts, 2, got 2"):
            predictors[0].predict_from_files(lists, outputs, num_parts=2, part_id=2)

    @pytest.mark.parametrize(
        "name",
        [
            "brain_bet.nii.gz",
            *(pytest.param(name, marks=pytest.mark.thorough) for name in ("brain_bet.nii", "brain.bet")),
        ],
    )
    def test_names_that_have_an_ending_already(self, predictors, scans, tmp_path, name):
        """As HD-BET gives them."""
        for folder, predictor in zip(("ours", "stock"), predictors, strict=True):
            (tmp_path / folder).mkdir()
            with quiet():
                predictor.predict_from_files(
                    [[str(scans / "a_0000.nii.gz")]], [str(tmp_path / folder / name)], num_processes_preprocessing=1,
                    num_processes_segmentation_export=1,
                )  # fmt: skip
        files = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("ours", "stock")]
        assert files[0] == files[1]
        label_file = next(each for each in files[0] if each.startswith("brain"))
        images = [sitk.ReadImage(str(tmp_path / folder / label_file)) for folder in ("ours", "stock")]
        check_labels(*map(sitk.GetArrayFromImage, images))

    def test_what_is_there_is_left(self, predictors, scans, tmp_path):
        (tmp_path / "a.nii.gz").write_bytes(b"mine")
        with quiet():
            predictors[0].predict_from_files(str(scans), str(tmp_path), False, False, 0, 0)
        assert (tmp_path / "a.nii.gz").read_bytes() == b"mine"
        assert (tmp_path / "b.nii.gz").exists()
        with quiet():
            assert predictors[0].predict_from_files(str(scans), str(tmp_path), False, False) is None

    def test_a_bad_file_is_an_error_and_leaves_nothing(self, predictors, tmp_path):
        (tmp_path / "x_0000.nii.gz").write_bytes(b"no image")
        with quiet(), pytest.raises(EngineError, match="x_0000"):
            predictors[0].predict_from_files(str(tmp_path), str(tmp_path / "out"))
        assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".json"]


class TestLogits:
    @pytest.mark.parametrize("shape", [(9, 20, 24), (6, 8, 30)])
    def test_of_preprocessed_data(self, predictors, shape):
        data = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        ours, stock = both(predictors, lambda each: each.predict_logits_from_preprocessed_data(data))
        assert ours.device == stock.device
        check_numbers(ours, stock, 0.02)

    def test_of_one_fold_after_the_other_by_hand(self, predictors):
        data = torch.randn(1, 9, 20, 24, generator=torch.Generator().manual_seed(0))
        answers = []
        for predictor in predictors:
            for weights in predictor.list_of_parameters:
                predictor.network.load_state_dict(weights)
                with quiet():
                    answers.append(predictor.predict_sliding_window_return_logits(data))
        for ours, stock in zip(answers[:2], answers[2:], strict=True):
            check_numbers(ours, stock, 0.02)
        assert (answers[0] - answers[1]).abs().max() > 0.1

    def test_iterators_are_interchangeable(self, predictors, image):
        def items(predictor):
            return predictor.get_data_iterator_from_raw_npy_data(image, None, {"spacing": SPACING}, None, 1)

        with quiet():
            (ours,), (stock,) = list(items(predictors[0])), list(items(predictors[1]))
            assert ours.keys() == stock.keys()
            assert ours["data"].dtype == stock["data"].dtype
            assert (ours["data"] - stock["data"]).abs().max() < 1e-4
            assert ours["ofile"] is stock["ofile"] is None
            for name in stock["data_properties"]:
                assert np.array_equal(ours["data_properties"][name], stock["data_properties"][name])
            (of_ours,) = predictors[1].predict_from_data_iterator(iter([ours]), False, 1)
            (of_stock,) = predictors[0].predict_from_data_iterator(iter([stock]), False, 1)
        assert isinstance(items(predictors[0]), Cases)
        check_labels(of_ours, of_stock)

    def test_data_in_a_file_is_read_and_removed(self, predictors, image, tmp_path):
        (item,) = predictors[0].get_data_iterator_from_raw_npy_data(image, None, {"spacing": SPACING}, None, 1)
        np.save(tmp_path / "data.npy", item["data"].numpy())
        (labels,) = predictors[0].predict_from_data_iterator([{**item, "data": str(tmp_path / "data.npy")}])
        assert not (tmp_path / "data.npy").exists()
        check_labels(labels, predictors[0].predict_single_npy_array(image, {"spacing": SPACING}))


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            {"use_gaussian": False},
            {"use_mirroring": False, "tile_step_size": 1.0},
            {"perform_everything_on_device": False, "verbose": True, "verbose_preprocessing": True},
        ],
    )
    def test_have_nnunets_meaning(self, model, image, settings):
        pair = [load(kind, model, **settings) for kind in (nnUNetPredictor, StockPredictor)]
        ours, stock = both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        check_labels(ours, stock)

    def test_the_old_name_of_the_device_argument(self):
        with quiet():
            assert nnUNetPredictor(perform_everything_on_gpu=True, device=torch.device("cpu")) is not None

    @pytest.mark.parametrize("folds", [(0,), ["0", 1], "0", ("0",), None, (np.int64(1),)])
    def test_forms_of_folds(self, model, folds):
        ours, stock = load(nnUNetPredictor, model, folds), load(StockPredictor, model, folds)
        assert len(ours.list_of_parameters) == len(stock.list_of_parameters)

    @pytest.mark.parametrize("folds", ["all", ("all",)])
    def test_fold_all(self, tmp_path, folds, image):
        folder = write_model(tmp_path, folds=("all",))
        ours, stock = both(
            [load(kind, folder, folds) for kind in (nnUNetPredictor, StockPredictor)],
            lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}),
        )
        check_labels(ours, stock)

    def test_fold_all_is_found_where_there_is_no_other(self, tmp_path):
        ours = load(nnUNetPredictor, write_model(tmp_path, folds=("all",)), None)
        assert len(ours.list_of_parameters) == 1

    def test_what_a_caller_reads(self, predictors):
        ours, stock = predictors
        assert ours.dataset_json == stock.dataset_json
        assert ours.plans_manager.plans == stock.plans_manager.plans
        assert ours.configuration_manager.configuration == stock.configuration_manager.configuration
        assert ours.label_manager.foreground_labels == stock.label_manager.foreground_labels
        assert (ours.trainer_name, ours.device) == (stock.trainer_name, stock.device)
        assert ours.allowed_mirroring_axes == stock.allowed_mirroring_axes == (0, 2)
        assert type(ours.network) is type(stock.network)
        with quiet():
            assert ours.auto_detect_available_folds is not None


@pytest.mark.parametrize(
    "kind",
    [
        CASCADE,
        PLAIN_2D,
        REGION_KIND,
        replace(PLAIN_CT, reader="NibabelIOWithReorient"),
        replace(PLAIN_CT, reader="SimpleITKIOWithReorient", transpose_forward=(2, 0, 1)),
        replace(PLAIN_CT, reader="NibabelIO"),
    ],
    ids=lambda kind: f"{kind.name}-{kind.reader}",
)
def test_kinds_of_model(tmp_path, image, kind):
    folder = write_model(tmp_path, kind, folds=("0",))
    pair = [load(each, folder, (0,)) for each in (nnUNetPredictor, StockPredictor)]
    previous = (smooth_scan(SHAPE) > 50).astype(np.int16)[None] if kind is CASCADE else None
    ours, stock = both(
        pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}, previous, None, True)
    )
    check_labels(ours[0], stock[0])
    check_numbers(ours[1], stock[1])
    if kind is CASCADE:
        with pytest.raises(EngineError, match="this model continues from the labels of 3d_lowres"):
            pair[0].predict_single_npy_array(image, {"spacing": SPACING})
        with pytest.raises(EngineError, match="labels of the previous stage must lie on the image's grid"):
            pair[0].predict_single_npy_array(image, {"spacing": SPACING}, previous[:, 1:])
