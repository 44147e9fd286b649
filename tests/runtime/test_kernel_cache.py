"""Compiled kernels that are kept: found again, bound to what they were made for, and never a reason to fail."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.cuda.driver import DeviceInfo
from reelforge.runtime.engines import kernel_cache
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.kernel_cache import KernelCache, RuntimeCache, kernel_file
from reelforge.runtime.engines.tensorrt_library import load_library
from reelforge.runtime.errors import EngineError
from reelforge.runtime.recipe import Backend
from tests.runtime.fake_cuda import FakeCuda, installed
from tests.runtime.fake_runtime_config import FakeConfig
from tests.runtime.fake_tensorrt import FakeTensorRt, add_plans

REQUEST = Request("a ball", height=32, width=48, frames=5, steps=3)
STAGES = 6


class Machine:
    """A GPU with a library; each generation is a process of its own to the library."""

    def __init__(self, bundle: Bundle) -> None:
        self.cuda = FakeCuda()
        self.library = FakeTensorRt(self.cuda)
        self.bundle = add_plans(bundle, self.library)

    def generate(self, request: Request = REQUEST, **options: Any) -> tuple[np.ndarray, int]:
        """Return the frames, and how often kernels were compiled."""
        self.library.kernels_compiled = 0
        with Pipeline(self.bundle, EngineOptions(**options)) as pipeline:
            frames = pipeline.generate(request)
        gc.collect()
        assert self.cuda.leaks() == {}
        assert set(self.library.alive.values()) == {0}
        assert self.library.caches_alive == 0
        assert self.library.misuse == []
        return frames, self.library.kernels_compiled


@pytest.fixture
def machine(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(Bundle.open(bundle_copy))
    with installed(monkeypatch, {"cuda.bindings.runtime": made.cuda, "tensorrt_rtx": made.library}):
        yield made


def test_kernels_are_compiled_once(machine: Machine, kernel_folder: Path) -> None:
    first, compiled = machine.generate()
    assert compiled >= STAGES
    files = {path: path.read_bytes() for path in kernel_folder.iterdir()}
    assert len(files) == STAGES
    second, compiled = machine.generate()
    assert compiled == 0
    np.testing.assert_array_equal(first, second)
    assert {path: path.read_bytes() for path in kernel_folder.iterdir()} == files


def test_other_shapes_are_added(machine: Machine) -> None:
    machine.generate()
    larger = replace(REQUEST, frames=9)
    assert machine.generate(larger)[1] > 0
    assert machine.generate(larger)[1] == 0
    assert machine.generate()[1] == 0


def test_kernels_are_kept_while_the_engine_is_open(machine: Machine, kernel_folder: Path) -> None:
    """A server that is killed has compiled for the next one."""
    with Pipeline(machine.bundle) as pipeline, pipeline.engine("vae_decoder") as engine:
        tile = engine.inputs["latent_tile"]
        shape = [size if isinstance(size, int) else 2 for size in tile.shape]
        engine.run({"latent_tile": np.zeros(shape, np.float32)})
        assert len(list(kernel_folder.iterdir())) == 1


def test_another_driver(machine: Machine, kernel_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine.generate()
    machine.library.driver = "590.1"
    assert machine.generate()[1] >= STAGES
    assert len(caplog.messages) == STAGES
    assert all("are not for this GPU, driver and library, and are compiled again" in text for text in caplog.messages)
    assert machine.generate()[1] == 0  # the new ones have taken their place
    assert len(list(kernel_folder.iterdir())) == STAGES


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "foreign"])
def test_a_damaged_file(machine: Machine, kernel_folder: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    machine.generate()
    victim = sorted(kernel_folder.iterdir())[0]
    content = victim.read_bytes()
    victim.write_bytes(
        {
            "cut": content[:-1],
            "altered": content[:-1] + bytes([content[-1] ^ 1]),
            "empty": b"",
            "foreign": b"something else entirely, and longer than a header of ours",
        }[damage]
    )
    assert machine.generate()[1] > 0
    assert caplog.messages == [f"the compiled kernels in {victim} are damaged and are compiled again"]
    assert victim.read_bytes() == content
    assert machine.generate()[1] == 0


def test_a_file_that_cannot_be_read(machine: Machine, kernel_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine.generate()
    victim = sorted(kernel_folder.iterdir())[0]
    victim.unlink()
    victim.mkdir()
    assert machine.generate()[1] > 0
    assert "cannot be read and are compiled again: " in caplog.messages[0]
    assert "are not kept: " in caplog.messages[1]
    assert [path.name for path in kernel_folder.iterdir() if path.name.endswith(".partial")] == []


def test_a_folder_that_cannot_be_written(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine.generate()
    assert caplog.messages
    assert all("the compiled kernels in" in text for text in caplog.messages)
    assert any("are not kept: " in text for text in caplog.messages)


def test_a_library_that_gives_none(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.library.no_kernels = True
    machine.generate()
    assert "are not kept: the library gave none" in caplog.messages[0]


def test_a_library_that_refuses_its_cache(
    machine: Machine, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeConfig, "set_runtime_cache", lambda self, cache: False)
    machine.generate()
    assert "are not kept: the library refused its own cache" in caplog.messages[0]
    assert not kernel_folder.exists()


def test_a_library_without_caches(
    machine: Machine, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(FakeConfig, "create_runtime_cache")
    assert machine.generate()[1] >= STAGES
    assert not kernel_folder.exists()
    assert caplog.messages == []


def test_switched_off(machine: Machine, kernel_folder: Path) -> None:
    machine.generate(kernel_cache=False)
    assert not kernel_folder.exists()


def test_backends_without_kernels_refuse_the_setting(fake_bundle: Path) -> None:
    with pytest.raises(EngineError, match="the setting 'kernel_cache' means nothing to ONNX Runtime on the CPU"):
        Pipeline(Bundle.open(fake_bundle), EngineOptions(kernel_cache=False)).generate(REQUEST)


def test_what_a_file_belongs_to(kernel_folder: Path) -> None:
    device = DeviceInfo(0, "NVIDIA GeForce RTX 4090", (8, 9), 24 << 30)
    file = kernel_file("a" * 64, "tensorrt_rtx 1.7.1.116", device)
    assert file.parent == kernel_folder
    assert kernel_file("a" * 64, "tensorrt_rtx 1.7.1.116", replace(device, ordinal=1, total_bytes=1)) == file
    others = [
        kernel_file("b" * 64, "tensorrt_rtx 1.7.1.116", device),
        kernel_file("a" * 64, "tensorrt_rtx 1.7.2", device),
        kernel_file("a" * 64, "tensorrt_rtx 1.7.1.116", replace(device, name="NVIDIA GeForce RTX 4080")),
        kernel_file("a" * 64, "tensorrt_rtx 1.7.1.116", replace(device, capability=(12, 0))),
    ]
    assert len({file, *others}) == 5


def test_the_folder_keeps_to_its_limit(tmp_path: Path) -> None:
    """What was not used for longest goes first, and never what was just written."""

    class Cache:
        def serialize(self) -> bytes:
            return bytes(1000)

    class Config:
        def create_runtime_cache(self) -> Cache:
            return Cache()

        def set_runtime_cache(self, cache: Cache) -> bool:
            return True

    for name in "abcd":
        cache = KernelCache(tmp_path / f"{name}.kernels", limit_bytes=2500)
        cache.attach(Config())
        cache.save()
        os.utime(cache.path, (ord(name), ord(name)))
        cache.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.kernels", "d.kernels"]
    large = KernelCache(tmp_path / "e.kernels", limit_bytes=10)
    large.attach(Config())
    large.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.kernels"]


def test_the_library_has_what_we_call() -> None:
    try:
        module = load_library(Backend.RTX).module
    except EngineError as error:
        pytest.skip(f"tensorrt_rtx is not installed: {error.received}")
    names = [name for name in vars(RuntimeCache) if not name.startswith("_")]
    assert [name for name in names if not hasattr(module.IRuntimeCache, name)] == []
    assert hasattr(module.IRuntimeConfig, "create_runtime_cache")
    assert hasattr(module.IRuntimeConfig, "set_runtime_cache")
    assert kernel_cache.LIMIT_BYTES > 0
