"""What callers change in a predictor counts as with nnU-Net's, and engines are shared until it does."""

import logging
import weakref

import numpy as np
import pytest
import torch
from nnturbo.engine import EngineError
from nnturbo.engine.backends import choose
from nnturbo.engine.backends.native import NativeRunner
from nnturbo.engine.nnunet import engines, nnUNetPredictor
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as StockPredictor

from tests.engine.nnunet.predictors import (
    SPACING,
    both,
    check_labels,
    check_numbers,
    load,
    quiet,
    write_model,
)
from tests.parity.kinds import NetworkKind


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A model whose channels suit nnturbo's kernels."""
    network = NetworkKind(features=(16, 16, 32))
    return write_model(tmp_path_factory.mktemp("wide"), folds=("0",), network=network)


@pytest.fixture
def with_kernels(monkeypatch):
    """Choose as outside of tests."""
    monkeypatch.setitem(choose.AUTOMATIC, "cpu", ("native", "torch"))


def put_into(network, how):
    """Change what a network computes, and not its weights."""
    first = network.encoder.stages[0][0].convs[0]
    if how == "hook":
        first.register_forward_hook(lambda module, given, features: features.roll(1, 1))
    elif how == "method":
        network.decoder.forward = lambda skips: -type(network.decoder).forward(network.decoder, skips)
    else:
        first.all_modules[2] = torch.nn.Tanh()


class TestChanges:
    def test_a_network_that_is_assigned_runs(self, model, image):
        class Shifted(torch.nn.Module):
            def __init__(self, network):
                super().__init__()
                self.network = network

            def forward(self, tiles):
                logits = self.network(tiles)
                logits[:, 1] += 1
                return logits

            def load_state_dict(self, *arguments, **named):
                return self.network.load_state_dict(*arguments, **named)

        pair = [load(kind, model) for kind in (nnUNetPredictor, StockPredictor)]
        before = pair[0].predict_single_npy_array(image, {"spacing": SPACING})
        for predictor in pair:
            predictor.network = Shifted(predictor.network)
        ours, stock = both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        check_labels(ours, stock)
        assert (ours != before).any()

    def test_weights_that_are_changed_in_place_count(self, model, image):
        pair = [load(kind, model, (0,)) for kind in (nnUNetPredictor, StockPredictor)]
        before = pair[0].predict_single_npy_array(image, {"spacing": SPACING})
        for predictor in pair:
            for weights in predictor.list_of_parameters:
                next(weights[name] for name in reversed(weights) if name.endswith("bias"))[2] += 2
        ours, stock = both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        check_labels(ours, stock)
        assert (ours != before).any()

    def test_reading_the_network_costs_no_speed(self, model):
        predictor = load(nnUNetPredictor, model)
        assert predictor.network is predictor.network
        predictor.network.eval()
        assert predictor._engine() is engines.shared_engine(predictor._source, predictor._settings())

    def test_a_step_of_a_subclass_runs(self, model, image, caplog):
        calls = []

        def of(kind):
            class Counting(kind):
                def _internal_maybe_mirror_and_predict(self, x):
                    calls.append(kind)
                    return super()._internal_maybe_mirror_and_predict(x)

            return Counting

        pair = [load(of(kind), model) for kind in (nnUNetPredictor, StockPredictor)]
        with caplog.at_level(logging.WARNING):
            ours, stock = both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
            both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        assert np.array_equal(ours, stock)
        assert calls.count(nnUNetPredictor) == calls.count(StockPredictor) > 0
        assert [line for line in caplog.messages if "nnU-Net's own code" in line] == [
            "nnU-Net's own code predicts, at its own speed: a step of its sliding window was replaced"
        ]

    def test_plans_that_are_changed_count(self, model, image, caplog):
        pair = [load(kind, model) for kind in (nnUNetPredictor, StockPredictor)]
        for predictor in pair:
            predictor.configuration_manager.configuration["spacing"] = [3.0, 1.0, 1.0]
        with caplog.at_level(logging.WARNING):
            ours, stock = both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        assert np.array_equal(ours, stock)
        assert "configuration_manager" in caplog.text

    def test_other_mirror_axes_count(self, model, image):
        pair = [load(kind, model) for kind in (nnUNetPredictor, StockPredictor)]
        for predictor in pair:
            predictor.allowed_mirroring_axes = (2,)
        ours, stock = both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        check_labels(ours, stock)

    def test_all_given_by_hand(self, model, image):
        stock = load(StockPredictor, model)
        fields = (stock.plans_manager, stock.configuration_manager, stock.list_of_parameters, stock.dataset_json)
        with quiet():
            ours = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
            ours.manual_initialization(stock.network, *fields, stock.trainer_name, stock.allowed_mirroring_axes)
        answers = both([ours, stock], lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        check_labels(*answers)
        data = torch.randn(1, 9, 20, 24, generator=torch.Generator().manual_seed(0))
        with quiet():
            ours.manual_initialization(stock.network, fields[0], fields[1], None, fields[3], stock.trainer_name, (0,))
            stock.allowed_mirroring_axes = (0,)
            logits = [each.predict_sliding_window_return_logits(data) for each in (ours, stock)]
        check_numbers(*logits, 0.02)

    def test_all_assigned_to_a_predictor_that_loaded_nothing(self, wide_model, image, with_kernels):
        """As MONAI's bundle does; nnU-Net's networks run with nnturbo's kernels all the same."""
        stock = load(StockPredictor, wide_model, (0,))
        with quiet():
            ours = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        for name in (
            "plans_manager", "configuration_manager", "list_of_parameters", "network", "dataset_json", "trainer_name",
            "allowed_mirroring_axes", "label_manager",
        ):  # fmt: skip
            setattr(ours, name, getattr(stock, name))
        images = both([ours, stock], lambda each: each.predict_from_list_of_npy_arrays(
            image, None, {"spacing": list(SPACING)}, truncated_ofname=None, save_probabilities=False, num_processes=2,
            num_processes_segmentation_export=2,
        ))  # fmt: skip
        for one, other in zip(*images, strict=True):
            check_labels(one, other)
        assert isinstance(ours._engine().segmenter.runner, NativeRunner)

    @pytest.mark.parametrize("how", ["hook", "method", "layer"])
    def test_what_was_put_into_nnunets_network_counts(self, wide_model, image, how, with_kernels):
        """The kernels know nothing of it, so torch runs such a network."""
        pair = [load(kind, wide_model, (0,)) for kind in (nnUNetPredictor, StockPredictor)]
        before = pair[0].predict_single_npy_array(image, {"spacing": SPACING})
        for predictor in pair:
            put_into(predictor.network, how)
        ours, stock = both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        check_labels(ours, stock)
        assert (ours != before).any()

    def test_a_network_that_is_no_module(self, model, image, caplog):
        class Remote:
            """Stands for a client of a server."""

            def __init__(self, network):
                self.network = network

            def to(self, device):
                return self

            def __getattr__(self, name):
                return getattr(self.__dict__["network"], name)

            def __call__(self, tiles):
                return -self.network(tiles)

        pair = [load(kind, model, (0,)) for kind in (nnUNetPredictor, StockPredictor)]
        for predictor in pair:
            predictor.network = Remote(predictor.network)
        with caplog.at_level(logging.WARNING):
            ours, stock = both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        assert np.array_equal(ours, stock)
        assert "its network is no torch.nn.Module, but a Remote" in caplog.text

    def test_folds_of_a_network_that_cannot_be_copied(self, model, image, caplog):
        class Compiled(torch.nn.Module):
            """Stands for a compiled program."""

            def __init__(self, network):
                super().__init__()
                self.network = network

            def __deepcopy__(self, memory):
                raise TypeError("cannot be copied")

            def load_state_dict(self, *arguments, **named):
                return self.network.load_state_dict(*arguments, **named)

            def forward(self, tiles):
                return self.network(tiles)

        pair = [load(kind, model) for kind in (nnUNetPredictor, StockPredictor)]
        for predictor in pair:
            predictor.network = Compiled(predictor.network)
        with caplog.at_level(logging.WARNING):
            ours, stock = both(pair, lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        check_labels(ours, stock)
        assert "a network of 2 folds must be one that can be copied" in caplog.text

    def test_plans_that_are_changed_after_a_network_was_given(self, model, image, caplog):
        stock = load(StockPredictor, model)
        with quiet():
            ours = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
            ours.manual_initialization(
                stock.network, stock.plans_manager, stock.configuration_manager, stock.list_of_parameters,
                stock.dataset_json, stock.trainer_name, stock.allowed_mirroring_axes,
            )  # fmt: skip
            before = ours.predict_single_npy_array(image, {"spacing": SPACING})
        stock.configuration_manager.configuration["spacing"] = [3.0, 2.5, 2.5]
        changed, expected = both([ours, stock], lambda each: each.predict_single_npy_array(image, {"spacing": SPACING}))
        check_labels(changed, expected)
        assert (changed != before).any()

    def test_without_a_model(self):
        with quiet():
            predictor = nnUNetPredictor(device=torch.device("cpu"))
        with pytest.raises(EngineError, match="the predictor has no model yet"):
            predictor.predict_logits_from_preprocessed_data(torch.zeros(1, 8, 8, 8))


class TestSharedEngines:
    def test_predictors_share_them_until_weights_change(self, tmp_path, image):
        folder = write_model(tmp_path / "m", folds=("0",))
        first, second = (load(nnUNetPredictor, folder, (0,)) for _ in range(2))
        assert first._engine() is second._engine()
        before = first.predict_single_npy_array(image, {"spacing": SPACING})
        other = write_model(tmp_path / "other", weights="random", folds=("0",))
        (other / "fold_0" / "checkpoint_final.pth").replace(folder / "fold_0" / "checkpoint_final.pth")
        third = load(nnUNetPredictor, folder, (0,))
        assert third._engine() is not None
        assert (third.predict_single_npy_array(image, {"spacing": SPACING}) != before).any()

    def test_a_predictor_holds_its_own(self, tmp_path, monkeypatch):
        """And nothing else does, beside the last one."""
        monkeypatch.setattr(engines, "MOST_BYTES", 1)
        first, second = (load(nnUNetPredictor, write_model(tmp_path / name, folds=("0",)), (0,)) for name in "ab")
        held, other = first._engine(), second._engine()
        assert first._engine() is held
        assert second._engine() is other
        gone = weakref.ref(held)
        del first, held
        assert gone() is None

    def test_few_are_kept(self, tmp_path, monkeypatch):
        monkeypatch.setattr(engines, "MOST_BYTES", 1)
        engines._kept.clear()
        folders = [write_model(tmp_path / name, folds=("0",)) for name in "abc"]
        for folder in folders:
            load(nnUNetPredictor, folder, (0,))
        assert len(engines._kept) == 1
