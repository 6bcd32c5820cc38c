"""Many scans at once, and less of one on the device where its memory is not enough."""

import logging
import threading
import time

import numpy as np
import pytest
import torch
from nnturbo.engine import Engine, EngineError, EngineOptions, Ensemble, PredictionError, Volume, VolumeError
from nnturbo.engine.backends.torch import TorchRunner
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.pipeline import loading
from nnturbo.engine.pipeline.loading import read
from nnturbo.engine.pipeline.steps import Placement, caught
from nnturbo.engine.pipeline.timing import Timings
from nnturbo.engine.pipeline.transfers import Transfers

from tests.engine.factory import multi_task, plans_json, smooth_scan, write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("many") / "m", plans=multi_task(plans_json()))


@pytest.fixture(scope="module")
def scans():
    shapes = [(9, 24, 26), (12, 20, 22), (5, 30, 18)]
    return [Volume.from_array(smooth_scan(shape), (3.0, 1.2, 1.2), name=str(shape)) for shape in shapes]


def same(one, other):
    """Up to rounding: other batch sizes add up in another order."""
    logits = [prediction.classification.logits for prediction in (one, other)]
    return np.array_equal(one.segmentation, other.segmentation) and logits[0] == pytest.approx(logits[1], abs=1e-5)


class TestPredictMany:
    def test_answers_come_in_order_and_are_those_of_predict(self, model, scans):
        engine = Engine.load(model, device="cpu")
        alone = [engine.predict(scan) for scan in scans]
        together = list(engine.predict_many(scans))
        assert all(same(one, other) for one, other in zip(alone, together, strict=True))
        assert {"read", "preprocess", "network", "stitch", "labels"} <= set(together[0].timings)

    def test_a_bad_scan_leaves_the_others_alone(self, model, scans):
        engine = Engine.load(model, device="cpu")
        first, bad, last = engine.predict_many([scans[0], "nowhere.nii.gz", scans[2]])
        assert isinstance(bad, VolumeError)
        assert "nowhere.nii.gz" in str(bad)
        assert same(first, engine.predict(scans[0]))
        assert same(last, engine.predict(scans[2]))

    def test_no_scans_give_no_answers(self, model):
        assert list(Engine.load(model, device="cpu").predict_many([])) == []

    def test_probabilities_and_progress(self, model, scans):
        seen = []
        engine = Engine.load(model, device="cpu")
        predictions = engine.predict_many(
            scans[:2], save_probabilities=True, progress=lambda *numbers: seen.append(numbers)
        )
        for prediction in predictions:
            assert np.array_equal(prediction.probabilities.argmax(0), prediction.segmentation)
        assert [index for index, done, total in seen if done == total] == [0, 1]

    def test_the_next_scan_is_read_while_the_network_runs(self, model, scans, tmp_path, monkeypatch):
        events = []

        def slow(self, tiles, original=TorchRunner.__call__):
            events.append(("network", threading.current_thread().name))
            time.sleep(0.05)
            return original(self, tiles)

        engine = Engine.load(model, device="cpu", backend="torch", mirror=False)
        monkeypatch.setattr(TorchRunner, "__call__", slow)
        monkeypatch.setattr(
            loading,
            "read",
            lambda *arguments: events.append(("read", threading.current_thread().name)) or read(*arguments),
        )
        list(engine.predict_many(scans))
        reads = [index for index, (what, _) in enumerate(events) if what == "read"]
        networks = [index for index, (what, _) in enumerate(events) if what == "network"]
        assert reads[1] < networks[-1]
        assert events[reads[0]][1].startswith("nnturbo-read")
        assert events[networks[0]][1].startswith("nnturbo-compute")

    def test_it_can_be_left_before_its_end(self, model, scans):
        seen = []
        predictions = Engine.load(model, device="cpu").predict_many(
            [scans[0]] * 50, progress=lambda index, done, total: seen.append(index)
        )
        next(predictions)
        predictions.close()
        assert max(seen) < 5  # the case at hand ends at its next tile
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("nnturbo-")]

    def test_an_ensemble_has_it_too(self, model, scans):
        ensemble = Ensemble.load([model, model], device="cpu", mirror=False)
        good, bad = ensemble.predict_many([scans[0], "nowhere.nii.gz"])
        assert same(good, ensemble.predict(scans[0]))
        assert isinstance(bad, VolumeError)

    def test_running_out_of_main_memory_is_an_answer(self):
        def fails():
            raise MemoryError

        assert "out of memory" in str(caught(fails))


class Small:
    """A device that takes so many tiles at once, and then no more."""

    def __init__(self, runner, most, fails=0):
        self.runner, self.most, self.fails, self.calls = runner, most, fails, []

    def __call__(self, tiles):
        self.calls.append(len(tiles))
        if len(tiles) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(self.calls) <= self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.runner(tiles)


class TestOutOfMemory:
    def engine(self, model, **limits):
        engine = Engine.load(model, device="cpu", options=EngineOptions(views_per_call=8))
        engine.segmenter.runner = Small(engine.segmenter.runner, **limits)
        return engine

    def test_fewer_views_go_at_once_from_then_on(self, model, scans, caplog):
        expected = Engine.load(model, device="cpu").predict(scans[0])
        engine = self.engine(model, most=3)
        with caplog.at_level(logging.WARNING):
            prediction = engine.predict(scans[0])
        assert same(prediction, expected)
        assert prediction.provenance[0].views_per_call == 2
        assert [line for line in caplog.messages if "not enough" in line] == [
            f"the device's memory is not enough for {before} views at once, sums on cpu; going on with {after} views "
            "at once, sums on cpu"
            for before, after in ((8, 4), (4, 2))
        ]
        assert engine.segmenter.runner.calls[:3] == [8, 4, 2]
        engine.predict(scans[1])
        assert set(engine.segmenter.runner.calls[2:]) == {2}

    def test_then_sums_go_to_main_memory_and_then_it_ends(self):
        steps, placement = [], Placement(views_per_call=3, sums_device=torch.device("cuda", 0))
        while placement is not None:
            steps.append((placement.views_per_call, placement.sums_device.type))
            placement = placement.smaller()
        assert steps == [(3, "cuda"), (1, "cuda"), (1, "cpu")]

    def test_a_tile_that_never_fits_is_an_error_that_says_so(self, model, scans):
        with pytest.raises(
            PredictionError, match=r"not enough for one tile of \(8, 12, 16\) voxels; use a GPU with more"
        ):
            self.engine(model, most=0).predict(scans[0])

    def test_votes_of_the_attempt_that_failed_do_not_count(self, model, scans):
        expected = Engine.load(model, device="cpu").predict(scans[0])
        engine = self.engine(model, most=8, fails=0)
        engine.segmenter.runner.most = 8
        runner, calls = engine.segmenter.runner.runner, []

        def fails_late(tiles):
            calls.append(len(tiles))
            if len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return runner(tiles)

        engine.segmenter.runner = fails_late
        assert same(engine.predict(scans[0]), expected)
        assert calls[:4] == [8, 8, 8, 4]

    def test_other_errors_of_torch_are_not_taken_for_it(self, model, scans):
        engine = self.engine(model, most=8)

        def broken(tiles):
            raise RuntimeError("a kernel is broken")

        engine.segmenter.runner = broken
        with pytest.raises(PredictionError, match="a kernel is broken"):
            engine.predict(scans[0])
        assert engine.segmenter.placement.views_per_call == 8


def test_logits_that_are_no_numbers_are_refused_in_any_row_of_tiles(model):
    deep = Volume.from_array(smooth_scan((40, 20, 22)), (3.0, 1.2, 1.2))
    for which in (0, -1):
        engine = Engine.load(model, device="cpu", mirror=False)
        runner, calls = engine.segmenter.runner, []
        engine.segmenter.runner = lambda tiles, runner=runner, calls=calls: calls.append(1) or runner(tiles)
        engine.predict(deep)
        total = len(calls)

        def broken(tiles, runner=runner, seen=[0], at=which % total):  # noqa: B006, counts its calls
            seen[0] += 1
            output = runner(tiles)
            return NetworkOutput(output.seg_logits / 0, output.class_logits) if seen[0] == at + 1 else output

        engine.segmenter.runner = broken
        with pytest.raises(PredictionError, match="logits must be finite"):
            engine.predict(deep)


def test_without_a_gpu_nothing_is_copied():
    transfers, tensor = Transfers(CPU), torch.arange(6)
    with transfers.uploading() as wait:
        pass
    assert wait() is None
    assert transfers.download(tensor)().ctypes.data == tensor.data_ptr()


def test_timings_add_up():
    timings = Timings(CPU)
    for _ in range(2):
        with timings("one"):
            time.sleep(0.01)
    with timings("two"):
        pass
    assert list(timings.as_dict()) == ["one", "two"]
    assert 20 <= timings.as_dict()["one"] < 2000


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
class TestOnAGpu:
    def test_labels_are_those_of_the_cpu(self, model, scans):
        expected = [Engine.load(model, device="cpu").predict(scan) for scan in scans]
        for precision, most in (("fp32", 2), ("fp16", 60)):
            found = Engine.load(model, device="cuda", precision=precision).predict_many(scans)
            for one, other in zip(expected, found, strict=True):
                assert np.count_nonzero(one.segmentation != other.segmentation) <= most

    def test_a_graph_gives_what_single_launches_give(self):
        from nnturbo.engine.backends.cuda_graph import GraphedNetwork

        torch.manual_seed(0)
        layers = [torch.nn.Conv3d(1, 8, 3, padding=1), *(torch.nn.Conv3d(8, 8, 3, padding=1) for _ in range(20))]
        network = torch.nn.Sequential(*layers).cuda().eval()
        graphed = GraphedNetwork(lambda tiles: (network(tiles),))
        with torch.inference_mode():
            for count in (2, 2, 2, 1, 1, 2, 1):
                tiles = torch.randn(count, 1, 8, 8, 8, device="cuda")
                assert torch.allclose(graphed(tiles)[0], network(tiles), atol=1e-5)
        assert any(recording is not None and recording.graph is not None for recording in graphed._recordings.values())

    def test_sums_may_stay_in_main_memory(self, model, scans):
        options = EngineOptions(sums_on_device=False)
        one = Engine.load(model, device="cuda", precision="fp32").predict(scans[0])
        other = Engine.load(model, device="cuda", precision="fp32", options=options).predict(scans[0])
        assert np.count_nonzero(one.segmentation != other.segmentation) <= 2


def cpu_out_of_memory():
    """Return what torch raises where main memory is not enough."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    return raised.value


@pytest.mark.parametrize(
    ("failure", "transient"),
    [
        (cpu_out_of_memory(), True),
        (RuntimeError("a kernel is broken"), False),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (VolumeError("cut off"), False),
        (VolumeError("the disk did not answer", transient=True), True),
        (ValueError("a bug"), None),
    ],
)
def test_predict_raises_what_predict_many_yields(model, monkeypatch, failure, transient):
    engine = Engine.load(model, device="cpu", mirror=False)

    def fails(*arguments, **named):
        raise failure

    monkeypatch.setattr(loading, "read_volume", fails)
    with pytest.raises(ValueError if transient is None else EngineError) as raised:
        engine.predict("scan.nii.gz")
    (yielded,) = engine.predict_many(["scan.nii.gz"])
    assert type(yielded) is type(raised.value)
    assert str(yielded) == str(raised.value)
    assert getattr(yielded, "transient", None) == getattr(raised.value, "transient", None) == transient


def test_memory_that_is_not_enough_in_the_network_passes(model, scans, monkeypatch):
    engine = Engine.load(model, device="cpu", mirror=False, backend="torch")
    failure = cpu_out_of_memory()

    def fails(tiles):
        raise failure

    monkeypatch.setattr(engine.segmenter, "runner", fails)
    with pytest.raises(PredictionError, match="out of memory") as raised:
        engine.predict(scans[0])
    assert raised.value.transient
