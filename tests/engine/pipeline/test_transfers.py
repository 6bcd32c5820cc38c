"""What comes back from a GPU, with a stand-in for CUDA that notes what waits for what."""

import contextlib

import numpy as np
import pytest
import torch
from nnturbo.engine import PredictionError
from nnturbo.engine.model.mirroring import mirror_views
from nnturbo.engine.model.runner import NetworkOutput
from nnturbo.engine.pipeline import finiteness
from nnturbo.engine.pipeline.finiteness import watch_finite
from nnturbo.engine.pipeline.probabilities import CHUNK_BYTES, ProbabilityPlanes, planes_at_once
from nnturbo.engine.pipeline.sliding_window import predict_logits
from nnturbo.engine.pipeline.timing import Timings
from nnturbo.engine.pipeline.transfers import Transfers, begin_to_ask
from nnturbo.engine.pipeline.window import SlidingWindow

from tests.engine.pipeline.cases import case_of, identity

CPU = torch.device("cpu")


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def is_cuda(self):
        return True

    def record_stream(self, stream):
        pass


@pytest.fixture
def events(monkeypatch):
    """What was done, in order."""
    noted = []

    class Event:
        def record(self, stream=None):
            self.number = sum(what == "recorded" for what, _ in noted)
            noted.append(("recorded", self.number))

        def synchronize(self):
            noted.append(("waited", self.number))

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            noted.append(("ordered", None))

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **named: real(*shape, **named))
    for name, stand_in in {
        "Event": Event, "Stream": Stream, "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return noted


@pytest.fixture
def transfers(events):
    return Transfers(torch.device("cuda", 0))


class TestDownloads:
    def test_a_copy_is_waited_for_only_when_it_is_fetched_and_is_nobody_elses(self, transfers, events):
        tensor = torch.arange(6.0).as_subclass(OnGpu)
        fetch = transfers.download(tensor)
        assert events == [("ordered", None), ("recorded", 0)]
        found = fetch()
        assert events[-1] == ("waited", 0)
        assert found.tolist() == [0, 1, 2, 3, 4, 5]
        assert fetch() is not found

    def test_a_copy_is_put_into_any_place(self, transfers, events):
        target = np.zeros((4, 3), np.float32).T
        place = transfers.download_into(target, torch.arange(12.0).reshape(3, 4).as_subclass(OnGpu))
        assert not target.any()
        place()
        assert np.array_equal(target, np.arange(12).reshape(3, 4))


class TestAsking:
    def test_a_gpu_is_waited_for_when_the_answer_is_wanted_and_not_for_what_came_after(self, events):
        ask = begin_to_ask(torch.tensor(True).as_subclass(OnGpu))
        assert events == [("recorded", 0)]
        assert ask() is True
        assert events == [("recorded", 0), ("waited", 0)]

    def test_a_cpu_answers(self):
        assert begin_to_ask(torch.tensor(False))() is False

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_one_value_that_is_no_number_is_enough(self, value):
        logits = torch.zeros(2, 3, 4, 5)
        watch_finite(logits)()
        watch_finite(logits[:, :0])()
        logits[1, 2, 3, 4] = value
        with pytest.raises(PredictionError, match="logits must be finite"):
            watch_finite(logits)()

    @pytest.mark.parametrize("slicewise", [False, True])
    def test_a_row_of_tiles_is_asked_about_when_the_next_one_has_begun(self, monkeypatch, slicewise):
        noted = []

        def asking(flag):
            number = sum(what == "begun" for what, _ in noted)
            noted.append(("begun", number))
            return lambda: noted.append(("asked", number)) or bool(flag)

        def network(tiles):
            noted.append(("network", None))
            return NetworkOutput(tiles)

        monkeypatch.setattr(finiteness, "begin_to_ask", asking)
        window = SlidingWindow(
            patch_size=(1 if slicewise else 4, 8, 8), tile_step_size=0.5, views=((),), views_per_call=1,
            slicewise=slicewise,
        )  # fmt: skip
        image = np.zeros((1, 12, 8, 8), np.float32)
        list(predict_logits(case_of(image), network, window, 1, timings=Timings()))
        rows = len(window.positions(image.shape[1:])[0])
        assert rows > 3
        one_later = [("network", None), ("begun", 0)]
        for row in range(1, rows):
            one_later += [("network", None), ("asked", row - 1), ("begun", row)]
        assert noted == [*one_later, ("asked", rows - 1)]


class TestProbabilities:
    @pytest.mark.parametrize("at_once", [1, 3, 4, 100])
    def test_planes_come_to_their_places_several_in_one_copy(self, transfers, events, at_once):
        planes = torch.randn(2, 10, 4, 5)
        target = np.zeros((10, 2, 5, 4), np.float32).transpose(1, 0, 3, 2)
        saved = ProbabilityPlanes(target, transfers, at_once)
        for plane in planes.unbind(1):
            saved.add(plane.as_subclass(OnGpu))
        saved.finish()
        assert np.array_equal(target, planes.numpy())
        copies = -(-10 // at_once)
        # A copy is waited for when the next one has begun.
        expected = [("recorded", 0)]
        for copy in range(1, copies):
            expected += [("recorded", copy), ("waited", copy - 1)]
        assert [event for event in events if event[0] != "ordered"] == [*expected, ("waited", copies - 1)]

    def test_no_planes_are_no_copies(self, transfers, events):
        ProbabilityPlanes(np.zeros((2, 0, 4, 5), np.float32), transfers, 3).finish()
        assert events == []

    def test_a_gpus_planes_are_copied_by_the_chunk(self):
        assert planes_at_once(CPU, 1) == 1
        assert planes_at_once(torch.device("cuda", 0), CHUNK_BYTES // 5) == 5
        assert planes_at_once(torch.device("cuda", 0), 2 * CHUNK_BYTES) == 1


class TestSeveralTilesAtOnce:
    def window(self, views, per_call, dtype=torch.float32):
        return SlidingWindow(
            patch_size=(4, 6, 6), tile_step_size=0.5, views=views, views_per_call=per_call, tiles_dtype=dtype
        )

    @pytest.mark.parametrize(
        ("axes", "per_call", "batches"),
        [
            ((), 8, {8, 4, 2, 1}),  # fifteen tiles in a row
            ((), 1, {1}),
            ((0,), 8, {8, 4, 2}),
            ((0, 1, 2), 8, {8}),
            ((0, 1, 2), 4, {4}),
            ((0, 1), 6, {4}),
        ],
    )
    def test_a_row_of_tiles_takes_few_batch_sizes(self, axes, per_call, batches):
        seen = set()

        def network(tiles):
            seen.add(len(tiles))
            return NetworkOutput(tiles)

        image = np.random.default_rng(0).normal(size=(1, 6, 18, 12)).astype(np.float32)
        window = self.window(mirror_views(axes), per_call)
        for _ in predict_logits(case_of(image), network, window, 1, timings=Timings()):
            pass
        assert len(window.positions(image.shape[1:])[1]) * len(window.positions(image.shape[1:])[2]) == 15
        assert seen == batches

    def test_the_network_is_given_the_number_type_it_takes(self):
        seen = set()

        def network(tiles):
            seen.add(tiles.dtype)
            return NetworkOutput(tiles.float())

        image = np.random.default_rng(0).normal(size=(1, 6, 9, 9)).astype(np.float32)
        window = self.window(((),), 2, torch.float16)
        found = torch.cat([p.clone() for p in predict_logits(case_of(image), network, window, 1, timings=Timings())], 1)
        assert seen == {torch.float16}
        assert np.abs(found.numpy() - image.astype(np.float16)).max() < 1e-5
        exact = self.window(((),), 2)
        exact = torch.cat([p.clone() for p in predict_logits(case_of(image), identity, exact, 1, timings=Timings())], 1)
        assert np.abs(exact.numpy() - found.numpy()).max() > 1e-5
