"""The CUDA layer on a real GPU. Needs cuda-python and numpy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from reelforge.runtime.cuda.driver import Copy, Cuda, open_cuda
from reelforge.runtime.cuda.graph import capture
from reelforge.runtime.cuda.memory import Arena, DeviceBuffer, PinnedBuffer
from reelforge.runtime.errors import EngineError

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    return open_cuda()


@pytest.fixture
def stream(cuda: Cuda) -> Iterator[int]:
    handle = cuda.create_stream()
    yield handle
    cuda.synchronize(handle)
    cuda.destroy_stream(handle)


def read(cuda: Cuda, stream: int, address: int, size: int) -> np.ndarray:
    result = np.empty(size, np.uint8)
    cuda.copy(result.ctypes.data, address, size, Copy.TO_HOST, stream)
    cuda.synchronize(stream)
    return result


def test_the_device(cuda: Cuda) -> None:
    free, total = cuda.memory()
    print(cuda.device)  # shown with -s: what the numbers of a run belong to
    assert cuda.device.name
    assert cuda.device.capability >= (7, 5)
    assert 0 < free <= total
    assert abs(total - cuda.device.total_bytes) < total // 10


def test_copies_of_all_kinds(cuda: Cuda, stream: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8)
    with (
        DeviceBuffer(cuda, source.size, "a test") as one,
        DeviceBuffer(cuda, source.size, "a test") as two,
        PinnedBuffer(cuda, source.size) as pinned,
    ):
        assert one.address % 256 == two.address % 256 == 0
        cuda.copy(one.address, source.ctypes.data, source.size, Copy.TO_DEVICE, stream)
        cuda.copy(two.address, one.address, source.size, Copy.ON_DEVICE, stream)
        np.testing.assert_array_equal(read(cuda, stream, two.address, source.size), source)
        pinned.bytes[: source.size] = source[::-1]
        cuda.copy(one.address, pinned.address, source.size, Copy.TO_DEVICE, stream)
        np.testing.assert_array_equal(read(cuda, stream, one.address, source.size), source[::-1])
        cuda.fill(two.address, 0xA5, source.size, stream)
        assert (read(cuda, stream, two.address, source.size) == 0xA5).all()


def test_memory_is_given_back(cuda: Cuda) -> None:
    DeviceBuffer(cuda, 1, "a first allocation").close()
    before, _ = cuda.memory()
    with DeviceBuffer(cuda, 256 << 20, "a test"):
        during, _ = cuda.memory()
    after, _ = cuda.memory()
    assert before - during >= 256 << 20
    assert after == before


def test_the_arena(cuda: Cuda) -> None:
    arena = Arena(cuda)
    before, _ = cuda.memory()
    for size in (64 << 20, 16 << 20, 256 << 20, 128 << 20):
        assert arena.reserve(size, "a test").size_bytes >= size
    assert (arena.size_bytes, arena.generation) == (256 << 20, 2)
    during, _ = cuda.memory()
    assert 256 << 20 <= before - during < 300 << 20
    arena.close()
    assert cuda.memory()[0] == before


def test_a_graph_replays_copies_and_fills(cuda: Cuda, stream: int) -> None:
    size = 1 << 20
    with (
        DeviceBuffer(cuda, size, "a test") as rows,
        DeviceBuffer(cuda, size, "a test") as target,
        PinnedBuffer(cuda, size) as staging,
    ):
        staging.bytes[:] = 1
        cuda.fill(target.address, 0, size, stream)

        def enqueue() -> None:
            cuda.copy(rows.address, staging.address, size, Copy.TO_DEVICE, stream)
            cuda.copy(target.address, rows.address, size // 2, Copy.ON_DEVICE, stream)
            cuda.fill(target.address + size // 2, 7, size // 2, stream)

        graph = capture(cuda, stream, enqueue)
        assert not read(cuda, stream, target.address, size).any(), "recording ran nothing"
        for value in (3, 200):
            staging.bytes[:] = value
            graph.launch(stream)
            result = read(cuda, stream, target.address, size)
            assert (result[: size // 2] == value).all()
            assert (result[size // 2 :] == 7).all()
        graph.close()


def test_events_measure_time(cuda: Cuda, stream: int) -> None:
    start, end = cuda.create_event(), cuda.create_event()
    with DeviceBuffer(cuda, 512 << 20, "a test") as buffer:
        cuda.record_event(start, stream)
        cuda.fill(buffer.address, 1, buffer.size_bytes, stream)
        cuda.record_event(end, stream)
        assert 0.001 < cuda.elapsed_ms(start, end) < 1000
    cuda.destroy_event(start)
    cuda.destroy_event(end)


def test_a_capture_that_fails_leaves_the_stream_usable(cuda: Cuda, stream: int) -> None:
    with DeviceBuffer(cuda, 1 << 10, "a test") as buffer:
        with pytest.raises(EngineError, match="cannot run what was enqueued"):
            capture(cuda, stream, lambda: cuda.synchronize(stream))
        cuda.fill(buffer.address, 9, buffer.size_bytes, stream)
        assert (read(cuda, stream, buffer.address, 1 << 10) == 9).all()


def test_errors_carry_the_code(cuda: Cuda, stream: int) -> None:
    _, total = cuda.memory()
    with pytest.raises(EngineError, match="too little memory for a test") as caught:
        DeviceBuffer(cuda, 2 * total, "a test")
    assert f"of {total} bytes free" in str(caught.value)
    with pytest.raises(EngineError) as caught:
        cuda.fill(0, 0, 1 << 10, stream)
    assert "cudaErrorInvalidValue (1)" in str(caught.value)
    with pytest.raises(EngineError, match="this machine has no GPU 999"):
        open_cuda(999)
    # Neither is a fault: the GPU goes on.
    with DeviceBuffer(cuda, 256, "a test") as buffer:
        cuda.fill(buffer.address, 4, 256, stream)
        assert (read(cuda, stream, buffer.address, 256) == 4).all()
