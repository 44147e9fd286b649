"""The CUDA layer over a fake of its bindings: every code becomes an error, every handle is given back once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import runtime as real

import reelforge.runtime.cuda.driver as driver
from reelforge.runtime.cuda.driver import Copy, Cuda, open_cuda
from reelforge.runtime.cuda.graph import capture
from reelforge.runtime.cuda.memory import Arena, DeviceBuffer, PinnedBuffer, aligned
from reelforge.runtime.errors import EngineError
from tests.runtime.fake_cuda import ILLEGAL_ADDRESS, OUT_OF_MEMORY, FakeCuda, Misuse, installed


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def cuda(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    with installed(monkeypatch, {"cuda.bindings.runtime": fake}):
        yield open_cuda()


def test_every_name_exists_in_the_real_bindings() -> None:
    tree = ast.parse(Path(driver.__file__).read_text())
    names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used = {name for name in names if name.startswith("cuda") and name.isalnum()}
    kinds = {name for name in used if name.startswith("cudaMemcpy") and "To" in name}
    modes = {name for name in used if name.startswith("cudaStreamCaptureMode") and name != "cudaStreamCaptureMode"}
    assert len(used) > 25
    assert len(kinds) == 3
    assert [name for name in used - kinds - modes if not hasattr(real, name)] == []
    assert all(hasattr(real.cudaMemcpyKind, name) for name in kinds)
    assert all(hasattr(real.cudaStreamCaptureMode, name) for name in modes)
    codes = {int(code) for code in real.cudaError_t}
    assert codes >= driver._NO_GPU | driver._CORRUPTED | {driver._OUT_OF_MEMORY}


def test_the_device_is_described(cuda: Cuda) -> None:
    assert (cuda.device.ordinal, cuda.device.name) == (0, "Fake GPU")
    assert cuda.device.architecture == "sm89"
    assert cuda.memory() == (1 << 30, 1 << 30)


@pytest.mark.parametrize(
    ("fake_gpu", "failures", "ordinal", "message"),
    [
        (None, {}, 0, "cuda-python is not installed"),
        (FakeCuda(devices=0), {}, 0, "no NVIDIA GPU that CUDA can use"),
        (FakeCuda(), {"cudaGetDeviceCount": [real.cudaError_t(35)]}, 0, "no NVIDIA GPU that CUDA can use"),
        (FakeCuda(), {"cudaGetDeviceCount": [real.cudaError_t(3)]}, 0, "cannot count this machine's GPUs"),
        (FakeCuda(), {"cudaSetDevice": [real.cudaError_t(46)]}, 0, "GPU 0 cannot choose GPU 0"),
        (FakeCuda(devices=2), {}, 2, "no GPU 2"),
        (FakeCuda(), {}, -1, "no GPU -1"),
    ],
)
def test_a_gpu_that_cannot_be_opened(
    fake_gpu: FakeCuda | None, failures: dict[str, list[object]], ordinal: int, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if fake_gpu is not None:
        fake_gpu.failures = dict(failures)
    with (
        installed(monkeypatch, {"cuda.bindings.runtime": fake_gpu}),
        pytest.raises(EngineError, match=message) as caught,
    ):
        open_cuda(ordinal)
    assert "received:" in str(caught.value)


def test_bytes_go_to_the_device_and_back(cuda: Cuda, fake: FakeCuda) -> None:
    source, target = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
    stream = cuda.create_stream()
    with DeviceBuffer(cuda, source.nbytes, "a test") as one, DeviceBuffer(cuda, source.nbytes, "a test") as two:
        assert one.size_bytes == 4096
        assert one.address % 256 == 0
        cuda.copy(one.address, source.ctypes.data, source.nbytes, Copy.TO_DEVICE, stream)
        cuda.copy(two.address, one.address, source.nbytes, Copy.ON_DEVICE, stream)
        cuda.copy(target.ctypes.data, two.address, source.nbytes, Copy.TO_HOST, stream)
        assert not target.any()
        cuda.synchronize(stream)
        np.testing.assert_array_equal(target, source)
        cuda.fill(two.address, 0, source.nbytes, stream)
        cuda.copy(target.ctypes.data, two.address, source.nbytes, Copy.TO_HOST, stream)
        cuda.synchronize(stream)
        assert not target.any()
    cuda.destroy_stream(stream)
    assert fake.leaks() == {}


def test_buffers_are_freed_once_and_gone_then(cuda: Cuda, fake: FakeCuda) -> None:
    for buffer in (DeviceBuffer(cuda, 0, "a test"), PinnedBuffer(cuda, 5)):
        assert buffer.size_bytes == 256
        buffer.close()
        buffer.close()
        with pytest.raises(AssertionError, match="after it was freed"):
            _ = buffer.address
    with PinnedBuffer(cuda, 8) as pinned:
        pinned.bytes[:] = 3
    assert fake.leaks() == {}
    assert [aligned(size) for size in (0, 1, 256, 257)] == [256, 256, 256, 512]


def test_the_arena_grows_to_the_largest_need(cuda: Cuda, fake: FakeCuda) -> None:
    arena = Arena(cuda)
    sizes = [1000, 200, 5000, 4000]
    blocks = [arena.reserve(size, "a test") for size in sizes]
    assert blocks[0] is blocks[1]
    assert blocks[2] is blocks[3]
    assert (arena.size_bytes, arena.generation) == (5120, 2)
    assert fake.used_bytes() == fake.peak_bytes == 5120, "old and new were never there together"
    arena.close()
    arena.close()
    assert fake.leaks() == {}
    assert arena.size_bytes == 0


def test_events_measure(cuda: Cuda, fake: FakeCuda) -> None:
    stream, start, end = cuda.create_stream(), cuda.create_event(), cuda.create_event()
    cuda.record_event(start, stream)
    cuda.record_event(end, stream)
    assert cuda.elapsed_ms(start, end) == 1
    cuda.destroy_event(start)
    cuda.destroy_event(end)
    cuda.destroy_stream(stream)
    assert fake.leaks() == {}


def test_a_graph_repeats_what_was_recorded(cuda: Cuda, fake: FakeCuda) -> None:
    stream = cuda.create_stream()
    result = np.zeros(64, np.uint8)
    with DeviceBuffer(cuda, 64, "a test") as buffer, PinnedBuffer(cuda, 64) as staging:
        graph = capture(
            cuda, stream, lambda: cuda.copy(buffer.address, staging.address, 64, Copy.TO_DEVICE, stream)
        )  # fmt: skip
        cuda.synchronize(stream)
        for value in (5, 9):
            staging.bytes[:] = value
            graph.launch(stream)
            cuda.copy(result.ctypes.data, buffer.address, 64, Copy.TO_HOST, stream)
            cuda.synchronize(stream)
            assert (result == value).all()
        graph.close()
        graph.close()
        with pytest.raises(AssertionError, match="after it was closed"):
            graph.launch(stream)
    cuda.destroy_stream(stream)
    assert fake.leaks() == {}


def test_a_failed_capture_leaves_the_stream_usable(cuda: Cuda, fake: FakeCuda) -> None:
    stream = cuda.create_stream()

    def stop() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        capture(cuda, stream, stop)
    with pytest.raises(EngineError, match="cannot run what was enqueued") as caught:
        capture(cuda, stream, lambda: cuda.synchronize(stream))
    assert "cudaErrorStreamCaptureUnsupported (900)" in str(caught.value)
    with pytest.raises(EngineError, match="cannot allocate"):
        capture(cuda, stream, lambda: DeviceBuffer(cuda, 1, "a test").close())
    fake.failures["cudaGraphInstantiate"] = [OUT_OF_MEMORY]
    with pytest.raises(EngineError, match="cannot make a graph executable"):
        capture(cuda, stream, lambda: None)
    cuda.synchronize(stream)
    cuda.destroy_stream(stream)
    assert fake.leaks() == {}


def test_too_little_memory_says_how_much_there_is(cuda: Cuda, fake: FakeCuda) -> None:
    with DeviceBuffer(cuda, 1 << 29, "a test"):
        with pytest.raises(EngineError, match="too little memory for the activations of stage 'dit'") as caught:
            DeviceBuffer(cuda, 1 << 30, "the activations of stage 'dit'")
        assert f"received: {1 << 29} of {1 << 30} bytes free" in str(caught.value)
        assert f"expected: {1 << 30} bytes" in str(caught.value)
        DeviceBuffer(cuda, 1 << 20, "a smaller need").close()
    assert fake.leaks() == {}


def test_each_failing_call_is_named(cuda: Cuda, fake: FakeCuda) -> None:
    stream = cuda.create_stream()
    code = real.cudaError_t.cudaErrorInvalidValue
    with DeviceBuffer(cuda, 8, "a test") as buffer:
        for name, call in {
            "cudaMalloc": lambda: cuda.allocate(8, "a test"),
            "cudaHostAlloc": lambda: cuda.allocate_pinned(8),
            "cudaMemcpyAsync": lambda: cuda.copy(buffer.address, buffer.address, 8, Copy.ON_DEVICE, stream),
            "cudaMemsetAsync": lambda: cuda.fill(buffer.address, 0, 8, stream),
            "cudaMemGetInfo": cuda.memory,
            "cudaStreamCreateWithFlags": cuda.create_stream,
            "cudaStreamBeginCapture": lambda: cuda.begin_capture(stream),
            "cudaEventCreateWithFlags": cuda.create_event,
            "cudaFree": lambda: cuda.free(1),
        }.items():
            fake.failures[name] = [code]
            with pytest.raises(EngineError, match="GPU 0 cannot") as caught:
                call()
            assert f"received: {name}: cudaErrorInvalidValue (1): invalid argument" in str(caught.value)
    cuda.destroy_stream(stream)


def test_after_a_fault_the_first_error_is_the_one_that_shows(cuda: Cuda, fake: FakeCuda) -> None:
    stream = cuda.create_stream()
    buffer = DeviceBuffer(cuda, 8, "a test")
    fake.fault_at_synchronize = ILLEGAL_ADDRESS
    with pytest.raises(EngineError, match="cannot run what was enqueued") as caught:
        cuda.synchronize(stream)
    assert "cudaErrorIllegalAddress (700)" in str(caught.value)
    assert "restart the program" in str(caught.value)
    buffer.close()
    cuda.activate_to_close()
    cuda.destroy_stream(stream)
    with pytest.raises(EngineError, match="cannot choose GPU 0"):
        cuda.activate()


def test_the_fake_notices_misuse(cuda: Cuda, fake: FakeCuda) -> None:
    stream = cuda.create_stream()
    buffer = DeviceBuffer(cuda, 256, "a test")
    with pytest.raises(Misuse, match="not inside of one live allocation"):
        cuda.fill(buffer.address + 1, 0, 256, stream) or cuda.synchronize(stream)
    cuda.fill(buffer.address, 0, 256, stream)
    with pytest.raises(Misuse, match="while work is enqueued"):
        cuda.free(buffer.address)
    cuda.synchronize(stream)
    address = buffer.address
    buffer.close()
    with pytest.raises(Misuse, match="is not allocated"):
        cuda.free(address)
    assert fake.leaks() == {"streams": 1}
