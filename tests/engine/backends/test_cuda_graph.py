"""How a network is launched on a GPU, with a stand-in for CUDA whose clock the network itself moves."""

import contextlib
import gc
import threading
import time
import weakref

import pytest
import torch
from nnturbo.engine.backends import cuda_graph
from nnturbo.engine.backends import torch as torch_backend
from nnturbo.engine.backends.cuda_graph import LEAST_LAUNCHING, MOST_RECORDED, TRIALS, GraphedNetwork
from nnturbo.engine.backends.own_thread import OwnThread
from nnturbo.engine.backends.torch import TorchRunner
from nnturbo.engine.model.folds import InferenceNetwork


class FakeCuda:
    """What the modules use of torch.cuda: events read a clock, and a graph has a time of its own."""

    def __init__(self, monkeypatch, graph_ms):
        self.now_ms, self.launched_ms, self.captured, self.replays = 0.0, 0.0, 0, 0
        self.streams, self.recording, self.given_back = [], 0, 0
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at_ms = None

            def record(self, stream=None):
                self.at_ms = fake.now_ms

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return other.at_ms - self.at_ms

        class Stream:
            def __init__(self, device=None):
                fake.streams.append(self)

            def wait_stream(self, other):
                pass

            def wait_event(self, event):
                pass

            def synchronize(self):
                pass

        class CUDAGraph:
            def replay(self):
                fake.replays += 1
                fake.now_ms += graph_ms

        @contextlib.contextmanager
        def graph(graph, stream, capture_error_mode):
            assert fake.recording == 0
            before = fake.now_ms
            fake.captured, fake.recording = fake.captured + 1, 1
            yield
            fake.now_ms, fake.recording = before, 0  # launches are noted, not done

        def empty_cache():
            assert fake.recording == 0
            fake.given_back += 1

        default = Stream()
        for name, stand_in in {
            "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "graph": graph,
            "current_stream": lambda device=None: default, "stream": lambda stream: contextlib.nullcontext(),
            "empty_cache": empty_cache,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(cuda_graph.time, "perf_counter", lambda: fake.launched_ms / 1e3)


class Network:
    """Takes so many milliseconds of the fake clock, and a share of them to launch."""

    def __init__(self, cuda, taken_ms, launching=1.0):
        self.cuda, self.taken_ms, self.launching, self.calls = cuda, taken_ms, launching, 0

    def __call__(self, tiles):
        self.calls += 1
        self.cuda.now_ms += self.taken_ms
        self.cuda.launched_ms += self.launching * self.taken_ms
        return (2 * tiles,)


class SlowToRecord(Network):
    """Stays a while in each call, so that another thread can come meanwhile."""

    def __call__(self, tiles):
        time.sleep(0.01)
        return super().__call__(tiles)


def run(graphed, count, tiles=2):
    for _ in range(count):
        batch = torch.randn(tiles, 1, 2, 2, 2)
        assert torch.equal(graphed(batch)[0], 2 * batch)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch, graph_ms=0.5)


def test_a_network_that_is_launched_sooner_than_it_runs_is_never_recorded(cuda):
    network = Network(cuda, 8.0, launching=0.9 * LEAST_LAUNCHING)
    run(GraphedNetwork(network), 5)
    assert (network.calls, cuda.captured, cuda.replays) == (5, 0, 0)


@pytest.mark.parametrize("taken_ms", [1.0, 8.0])
def test_a_network_that_waits_for_launches_is_recorded_at_the_second_call_and_replayed_from_the_third_on(
    cuda, taken_ms
):
    network = Network(cuda, taken_ms)
    graphed = GraphedNetwork(network)
    run(graphed, 1)
    assert (network.calls, cuda.captured) == (1, 0)
    run(graphed, 1)
    assert (network.calls, cuda.captured, cuda.replays) == (2 + TRIALS + 1 + 1, 1, TRIALS + 1)
    before = network.calls
    graphed(torch.zeros(2, 1, 2, 2, 2))
    assert (network.calls, cuda.replays) == (before, TRIALS + 2)


def test_all_networks_are_recorded_on_one_stream_one_at_a_time(cuda, monkeypatch):
    cuda_graph._recording_stream.cache_clear()
    before = len(cuda.streams)
    workspaces = []
    monkeypatch.setattr(cuda_graph, "_keep_workspace", lambda tiles: workspaces.append(cuda.recording))
    failed = []

    def record():
        graphed = GraphedNetwork(SlowToRecord(cuda, 1.0))
        try:
            for _ in range(3):
                graphed(torch.zeros(2, 1, 2, 2, 2))
        except AssertionError as error:
            failed.append(error)

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert cuda.captured == 3
    assert len(cuda.streams) == before + 1
    assert workspaces == 6 * [0]  # asked for before the first call, and before the recording
    assert cuda.given_back == 6  # before the first call, and after the recording
    cuda_graph._recording_stream.cache_clear()  # of the stand-in


def test_a_graph_that_gains_nothing_is_forgotten(monkeypatch):
    cuda = FakeCuda(monkeypatch, graph_ms=1.0)
    network = Network(cuda, 1.0)
    run(GraphedNetwork(network), 4)
    assert cuda.replays == TRIALS + 1
    assert network.calls == 4 + TRIALS + 1 + 1


def test_a_network_that_cannot_be_recorded_runs_as_before(cuda, monkeypatch, caplog):
    @contextlib.contextmanager
    def refuses(*arguments, **named):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    run(GraphedNetwork(Network(cuda, 1.0)), 4)
    assert "cannot be a CUDA graph: operation not permitted when stream is capturing" in caplog.text


def test_as_many_batch_sizes_are_kept_as_there_may_be(cuda):
    network = Network(cuda, 1.0)
    graphed = GraphedNetwork(network)
    for tiles in range(1, MOST_RECORDED + 1):
        run(graphed, 2, tiles)
    assert cuda.captured == MOST_RECORDED
    run(graphed, 2, MOST_RECORDED + 1)
    assert len(graphed._recordings) == MOST_RECORDED
    assert torch.Size([1, 1, 2, 2, 2]) not in graphed._recordings


def test_recordings_are_let_go_where_memory_is_short(cuda):
    graphed = GraphedNetwork(Network(cuda, 1.0))
    run(graphed, 2)
    graphed._network = lambda tiles: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        graphed(torch.zeros(1, 1, 2, 2, 2))
    assert not graphed._recordings


class TestOwnThread:
    def test_calls_from_all_threads_run_in_one(self, cuda):
        own, seen = OwnThread(torch.device("cuda", 0)), []
        for _ in range(3):
            asking = threading.Thread(target=lambda: seen.append(own(threading.get_ident)))
            asking.start()
            asking.join()
        seen.append(own(threading.get_ident))
        assert len(set(seen)) == 1
        assert threading.get_ident() not in seen

    def test_calls_run_on_the_stream_of_who_asks(self, cuda, monkeypatch):
        entered = []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {threading.current_thread().name}")
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or contextlib.nullcontext())
        own = OwnThread(torch.device("cuda", 0))
        asking = threading.Thread(target=lambda: own(lambda: None), name="reader")
        asking.start()
        asking.join()
        assert entered == ["stream of reader"]

    def test_what_fails_is_raised_and_holds_on_to_nothing(self, cuda):
        own = OwnThread(torch.device("cuda", 0))

        class Held:
            pass

        def fails():
            held = Held()
            seen.append(weakref.ref(held))
            raise torch.OutOfMemoryError("CUDA out of memory")

        seen = []
        gc.disable()
        try:
            with pytest.raises(torch.OutOfMemoryError):
                own(fails)
            own(lambda: None)  # its thread is done with the call before
            assert seen[0]() is None
        finally:
            gc.enable()

    def test_its_thread_ends_with_it(self, cuda):
        own = OwnThread(torch.device("cuda", 0))
        thread = own(threading.current_thread)
        del own
        gc.collect()
        thread.join(5)
        assert not thread.is_alive()


class TestAlgorithms:
    def test_cudnn_tries_them_whatever_the_process_has_set_and_leaves_that(self, monkeypatch):
        class Spy(torch.nn.Module):
            networks, multi_task = (), False

            def forward(self, tiles):
                seen.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32))
                return (tiles,)

        seen = []
        for before in (False, True):
            monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
            TorchRunner(Spy(), torch.device("cpu"), "fp32")(torch.zeros(1, 1, 2, 2, 2))
            assert torch.backends.cudnn.benchmark is before
        assert seen == [(True, False)] * 2

    def test_on_a_gpu_every_call_is_made_in_the_networks_own_thread(self, cuda, monkeypatch):
        made = []
        monkeypatch.setattr(torch_backend, "OwnThread", lambda device: made.append(device) or (lambda run: "there"))
        device = torch.device("cuda", 1)
        assert TorchRunner(InferenceNetwork([torch.nn.Identity()]), device, "fp16")(torch.zeros(1)) == "there"
        assert made == [device]
        assert isinstance(
            TorchRunner(InferenceNetwork([torch.nn.Identity()]), device, "fp16")._run, cuda_graph.GraphedNetwork
        )

    @pytest.mark.parametrize(
        ("device", "precision", "dtype"),
        [
            ("cuda", "fp16", torch.float16),
            ("cuda", "bf16", torch.bfloat16),
            ("cuda", "fp32", torch.float32),
            ("cpu", "bf16", torch.float32),  # bit for bit what it was
        ],
    )
    def test_on_a_gpu_tiles_come_as_autocast_would_make_them(self, cuda, device, precision, dtype):
        assert (
            TorchRunner(InferenceNetwork([torch.nn.Identity()]), torch.device(device), precision).tiles_dtype == dtype
        )
