"""How calls are timed by ``benchmarks.gpu.clock``, on a device that is made up here."""

import inspect

import pytest
import torch

from benchmarks.gpu import clock

CPU = torch.device("cpu")


class FakeGraph:
    """Of torch.cuda: notes what is done; a millisecond passes for each call that is launched or replayed."""

    def __init__(self):
        self.calls = 0

    def replay(self):
        Device.now += self.calls


class Device:
    now, capturing, log = 0.0, None, []


class FakeCapture:
    def __init__(self, *arguments, **options):
        inspect.signature(REAL_CAPTURE.__init__).bind(None, *arguments, **options)  # as torch would take them
        self.graph = arguments[0]

    def __enter__(self):
        Device.capturing = self.graph

    def __exit__(self, *_):
        Device.capturing = None


class FakeEvent:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = Device.now

    def elapsed_time(self, end):
        return end.at - self.at


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


REAL_CAPTURE = torch.cuda.graph


@pytest.fixture
def device(monkeypatch):
    Device.now, Device.capturing, Device.log = 0.0, None, []
    for name in ("synchronize", "_sleep", "Stream", "Event", "CUDAGraph", "current_stream", "stream"):
        assert hasattr(torch.cuda, name)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: Device.log.append(cycles))
    return torch.device("cuda")


def call(ms=1.0):
    def run():
        if Device.capturing is None:
            Device.now += ms
        else:
            Device.capturing.calls += ms

    return run


def test_times_of_a_device_are_those_of_one_call_by_its_own_clock(device):
    row = clock.time_calls([call(2.0), call(4.0)], device, 0.01)
    assert row["graph_ms"] == row["queued_ms"] == row["ms"] == 3.0
    assert row["timed"] == "graph replays" and 0 < row["wall_ms"] < 3.0  # of the host, which only launches
    assert Device.log and all(0 < cycles <= 0.2 * clock.CLOCK_HZ for cycles in Device.log)


def test_what_cannot_be_captured_is_timed_all_the_same(device):
    def run():
        if Device.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        Device.now += 1.0

    row = clock.time_calls([run], device, 0.01)
    assert row["ms"] == row["queued_ms"] == 1.0 and "graph_ms" not in row
    assert row["not_captured"] == "operation not permitted when stream is capturing"


def test_long_calls_are_not_captured(device, monkeypatch):
    monkeypatch.setattr(clock, "LONG_MS", 0.0)
    row = clock.time_calls([call()], device, 0.01)
    assert row["timed"] == "queued behind a sleep" and "not_captured" not in row


def test_a_capture_on_a_processor_fills_the_same_memory():
    x = torch.ones(3)
    replay, result = clock.capture(lambda: [2 * x], CPU)
    x.fill_(5)
    assert result[0].tolist() == [2, 2, 2]
    replay()
    assert result[0].tolist() == [10, 10, 10]
