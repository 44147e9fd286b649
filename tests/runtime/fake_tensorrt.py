"""A stand-in for ``tensorrt`` and ``tensorrt_rtx`` whose plans are ONNX graphs, computed by ONNX Runtime on the CPU.

It runs over :mod:`tests.runtime.fake_cuda` and checks what the real libraries leave undefined: addresses inside of live
allocations and aligned, shapes inside of the profile, activation memory of the right size that no tensor overlaps, one
stream, one graph per context whose settings stay, and objects that outlive what stands on them. An execution scribbles
over all of its activation memory.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import json
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.engines.engine import EngineOptions
from reelforge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine, engine_from_bytes
from reelforge.runtime.engines.tensorrt_library import DATA_TYPES, ITEM_BYTES, MODULES
from reelforge.runtime.manifest import FileEntry, PlanEntry, ProfileEntry, StageEntry, TensorInfo
from reelforge.runtime.plan_file import architecture_mask
from reelforge.runtime.recipe import Backend, Target, VideoShape
from tests.runtime.fake_cuda import FakeCuda, Misuse
from tests.runtime.fake_runtime_config import FakeConfig, FakeRuntimeCache

VERSIONS = {Backend.RTX: "1.7.1.116", Backend.TRT: "10.14.1.48"}
WIDE = (1, 4, 64)
"""A profile's range of any named dimension, unless a test says otherwise."""
SHAPES = (VideoShape(32, 48, 13), VideoShape(48, 48, 5), VideoShape(32, 48, 9))


@dataclass
class Settings:
    """What a context has been told. A new object for each change, so that identity tells whether anything changed."""

    profile: int | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)


class FakeTensorRt:
    """The module. Attributes named as TensorRT's are TensorRT's; the others are for tests."""

    class DataType(enum.Enum):
        FLOAT, HALF, BF16, INT64, INT32, BOOL = range(6)

    class TensorIOMode(enum.Enum):
        INPUT, OUTPUT = range(2)

    class TensorLocation(enum.Enum):
        DEVICE, HOST = range(2)

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    class DynamicShapesKernelSpecializationStrategy(enum.Enum):
        LAZY, EAGER, NONE = range(3)

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, cuda: FakeCuda, backend: Backend = Backend.RTX) -> None:
        self.cuda = cuda
        self.backend = backend
        self.__name__ = MODULES[backend]
        self.__version__ = VERSIONS[backend]
        self.plans: dict[str, tuple[PlanEntry, bytes, Path]] = {}  # path in the bundle -> entry, graph, its folder
        self.refused: list[str] = []  # the next deserialisations fail with these messages
        self.no_context = False
        self.failing_executions: list[str] = []  # the next executions return False with these messages
        self.fails_in_capture = False
        self.capturable = True
        self.on_host: set[str] = set()
        self.executions: list[str] = []  # plans, in the order in which they ran
        self.enqueued: list[str] = []  # plans, as execute_async_v3 was called
        self.misuse: list[str] = []  # what a finaliser found, which cannot raise
        self.alive = {"runtime": 0, "engine": 0, "context": 0}
        self.caches_alive = 0
        self.kernels_compiled = 0
        self.driver = "580.65"  # what a cache of kernels is bound to
        self.no_kernels = False  # serialize gives None

    def Runtime(self, logger: Any) -> FakeRuntime:
        return FakeRuntime(self, logger)

    def track(self, thing: object, kind: str, *needed_later: str) -> None:
        """Count a live object, and note in the log when it goes."""

        def gone() -> None:
            self.alive[kind] -= 1
            self.cuda.log.append(f"~{kind}")
            self.misuse += [f"a {kind} went before a {other}" for other in needed_later if self.alive[other]]

        self.alive[kind] += 1
        weakref.finalize(thing, gone).atexit = False


class FakeRuntime:
    def __init__(self, module: FakeTensorRt, logger: Any) -> None:
        assert isinstance(logger, FakeTensorRt.ILogger)
        self.module, self.logger = module, logger
        module.track(self, "runtime", "engine", "context")

    def deserialize_cuda_engine(self, plan: Any) -> FakeEngine | None:
        if self.module.refused:
            self.logger.log(self.logger.INFO, "not worth showing")
            self.logger.log(self.logger.ERROR, self.module.refused.pop(0))
            return None
        header, payload = bytes(plan)[:64], json.loads(bytes(plan)[64:])
        assert header[:4] == b"vtrt"
        return FakeEngine(self.module, self.logger, *self.module.plans[payload["path"]])


class FakeEngine:
    def __init__(self, module: FakeTensorRt, logger: Any, plan: PlanEntry, graph: bytes, folder: Path) -> None:
        self.module, self.logger, self.plan = module, logger, plan
        stage = StageEntry(plan.path, "", "", plan.inputs, plan.outputs, (), None, None, {})
        self.network: OnnxRuntimeEngine = engine_from_bytes(graph, folder, stage, EngineOptions(1, False))
        self.infos = {info.name: info for info in (*plan.inputs, *plan.outputs)}
        self.num_io_tensors = len(self.infos)
        self.num_optimization_profiles = len(plan.profiles)
        self.weights = module.cuda._allocate(module.cuda.device, max(plan.weight_bytes, 1))
        module.track(self, "engine")
        weakref.finalize(self, module.cuda.device.pop, self.weights).atexit = False

    def get_tensor_name(self, index: int) -> str:
        return list(self.infos)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.module.TensorIOMode["INPUT" if self.infos[name] in self.plan.inputs else "OUTPUT"]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.module.DataType[DATA_TYPES[self.infos[name].dtype]]

    def get_tensor_location(self, name: str) -> Any:
        return self.module.TensorLocation["HOST" if name in self.module.on_host else "DEVICE"]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return self.plan.profiles[profile].activation_bytes

    def create_runtime_config(self) -> FakeConfig:
        assert self.module.backend is Backend.RTX
        return FakeConfig(self.module)

    def create_execution_context(self, settings: Any) -> FakeContext | None:
        strategy = settings
        if self.module.backend is Backend.RTX:
            assert isinstance(settings, FakeConfig)
            strategy = settings.strategy
            eager = self.module.DynamicShapesKernelSpecializationStrategy.EAGER
            assert settings.dynamic_shapes_kernel_specialization_strategy is eager
        assert strategy is self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.module.no_context:
            self.logger.log(self.logger.ERROR, "out of memory for a context")
            return None
        if self.module.backend is not Backend.RTX:
            return FakeContext(self)
        context = FakeRtxContext(self)
        context.kernels = settings.kernels
        if (cache := settings.kernels()) is not None:
            cache.contexts.append(weakref.ref(context))
        return context


class FakeContext:
    kernels: Callable[[], FakeRuntimeCache | None] = staticmethod(lambda: None)

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.module = engine, engine.module
        self.settings = Settings()
        self.warm_shapes: object = None  # of the last execution outside of a capture
        self.recorded: Settings | None = None  # of the one graph that this context is in
        self.module.track(self, "context")

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._on_the_stream(stream)
        assert 0 <= index < len(self.engine.plan.profiles)
        self._change(profile=index, shapes={})
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if self.settings.profile is None:
            raise Misuse("a shape before a profile")
        info = self.engine.infos[name]
        assert info in self.engine.plan.inputs
        ranges = self.engine.plan.profiles[self.settings.profile].dimensions
        for dimension, size in zip(info.shape, shape, strict=True):
            low, _, high = (dimension,) * 3 if isinstance(dimension, int) else ranges[dimension]
            if not low <= size <= high:
                self.engine.logger.log(self.engine.logger.ERROR, f"{name} {tuple(shape)} is not in the profile")
                return False
        if self.settings.shapes.get(name) != tuple(shape):
            self._change(shapes={**self.settings.shapes, name: tuple(shape)})
        return True

    def infer_shapes(self) -> list[str]:
        return [info.name for info in self.engine.plan.inputs if info.name not in self.settings.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.settings.shapes:
            return self.settings.shapes[name]
        assert not self.infer_shapes()
        return self._shapes_of_outputs()[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self.engine.infos
        if memory % 256:
            raise Misuse(f"{name} is not aligned")
        if self.settings.addresses.get(name) != memory:
            self._change(addresses={**self.settings.addresses, name: memory})
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % 256:
            raise Misuse("activation memory is not aligned")
        self.module.cuda.view(memory, size)
        self._change(memory=(memory, size))

    def execute_async_v3(self, stream: int) -> bool:
        module, cuda, plan = self.module, self.module.cuda, self.engine.plan
        self._on_the_stream(stream)
        module.enqueued.append(plan.path)
        cuda.log.append(f"execute {Path(plan.path).name}")
        if module.failing_executions:
            self.engine.logger.log(self.engine.logger.ERROR, module.failing_executions.pop(0))
            return False
        settings = self.settings
        if settings.profile is None or self.infer_shapes() or set(settings.addresses) != set(self.engine.infos):
            raise Misuse(f"{plan.path} runs before all profiles, shapes and addresses are set")
        need = plan.profiles[settings.profile].activation_bytes
        if settings.memory[1] < need:
            raise Misuse(f"{settings.memory[1]} bytes of activation memory, {need} needed")
        shapes = {**settings.shapes, **self._shapes_of_outputs()}
        ranges = {
            name: (settings.addresses[name], int(np.prod(shapes[name], dtype=np.int64)) * ITEM_BYTES[info.dtype])
            for name, info in self.engine.infos.items()
        }
        _disjoint({**ranges, "activations": settings.memory}, {info.name for info in plan.inputs})
        for address, size in (*ranges.values(), settings.memory):
            cuda.view(address, size)
        self._compile_kernels()
        if cuda.capturing(stream):
            if module.fails_in_capture or self.warm_shapes != (settings.profile, settings.shapes):
                self.engine.logger.log(self.engine.logger.ERROR, "cannot be captured before a run with these shapes")
                cuda.streams[int(stream)].valid = False
                return False
            self.recorded = settings
        else:
            self.warm_shapes = (settings.profile, settings.shapes)
        cuda.enqueue(stream, self._work(settings, shapes, ranges, captured=cuda.capturing(stream)))
        return True

    def _work(
        self, settings: Settings, shapes: dict[str, tuple[int, ...]], ranges: dict[str, tuple[int, int]], captured: bool
    ) -> Callable[[], None]:
        """The kernels. They must not keep the context: whether it is still there is one of the questions."""
        weak, module, path = weakref.ref(self), self.module, self.engine.plan.path

        def work() -> None:
            context = weak()
            if context is None:
                raise Misuse(f"{path} runs after its context was destroyed")
            if context.settings is not settings:
                raise Misuse(f"the settings of {path} were changed between {'recording' if captured else 'enqueueing'} "
                             "and running")  # fmt: skip
            if captured and context.recorded is not settings:
                raise Misuse(f"{path} is in two graphs")
            tensors = {
                name: module.cuda.view(address, size).view(context.engine.infos[name].dtype).reshape(shapes[name])
                for name, (address, size) in ranges.items()
            }
            module.cuda.view(*settings.memory)[:] = 0xEE
            plan = context.engine.plan
            context.engine.network.run(
                {info.name: tensors[info.name] for info in plan.inputs},
                {info.name: tensors[info.name] for info in plan.outputs},
            )
            module.executions.append(path)

        return work

    def _compile_kernels(self) -> None:
        """Those of the present shapes, unless the cache has them."""
        cache = self.kernels()
        wanted = f"{self.engine.plan.path} {self.settings.profile} {sorted(self.settings.shapes.items())}"
        if cache is None or wanted not in cache.kernels:
            self.module.kernels_compiled += 1
        if cache is not None:
            cache.kernels.add(wanted)

    def _shapes_of_outputs(self) -> dict[str, tuple[int, ...]]:
        """From a run on zeros, since the graphs' own shape inference is not what is tested here."""
        key = tuple(self.settings.shapes.items())
        cache: dict[Any, dict[str, tuple[int, ...]]] = self.engine.__dict__.setdefault("shape_cache", {})
        if key not in cache:
            inputs = {
                info.name: np.zeros(self.settings.shapes[info.name], info.dtype) for info in self.engine.plan.inputs
            }
            cache[key] = {name: value.shape for name, value in self.engine.network.run(inputs).items()}
        return cache[key]

    def _change(self, **changes: Any) -> None:
        self.settings = replace(self.settings, **changes)

    def _on_the_stream(self, stream: int) -> None:
        if list(self.module.cuda.streams) != [stream]:
            raise Misuse(f"stream {stream} is not the only one: {list(self.module.cuda.streams)}")


class FakeRtxContext(FakeContext):
    def is_stream_capturable(self, stream: int) -> bool:
        self._on_the_stream(stream)
        return self.module.capturable


def _disjoint(ranges: dict[str, tuple[int, int]], only_read: set[str]) -> None:
    """What is written overlaps nothing; two inputs may be the same memory."""
    for (name, (address, size)), (other, (start, length)) in itertools.combinations(ranges.items(), 2):
        if address < start + length and start < address + size and not {name, other} <= only_read:
            raise Misuse(f"{name} and {other} overlap")


@dataclass(frozen=True)
class Part:
    """A part of a stage: a graph, and its tensors."""

    graph: bytes
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def add_plans(
    bundle: Bundle, module: FakeTensorRt, architectures: Sequence[tuple[str, ...]] = (("sm89", "sm120"),),
    parts: dict[str, Sequence[Part]] | None = None, profiles: dict[str, Sequence[ProfileEntry]] | None = None,
) -> Bundle:  # fmt: skip
    """Return a bundle for ``module``'s backend whose stages have plans, one or several parts per group.

    The plans' files are written into the bundle's folder; the manifest in it stays that of the CPU.
    """
    (bundle.path / "plans").mkdir(exist_ok=True)
    stages = []
    files = list(bundle.manifest.files)
    for number, stage in enumerate(bundle.manifest.stages):
        graph = bundle.graph(stage.name).read_bytes()
        pieces = (parts or {}).get(stage.name, [Part(graph, stage.inputs, stage.outputs)])
        plans = []
        for group in architectures:
            for index, piece in enumerate(pieces):
                label = f"{stage.name}.{index}" if len(pieces) > 1 else stage.name
                path = f"plans/{label}.{'+'.join(group)}.plan"
                names = {size for info in piece.inputs for size in info.shape if isinstance(size, str)}
                default = [
                    ProfileEntry("default", dict.fromkeys(sorted(names), WIDE), 1000 * (number + 1) + 700 * index)
                ]
                plan = PlanEntry(
                    path, f"receipts/{label}.json", group, index, len(pieces), piece.inputs, piece.outputs,
                    tuple((profiles or {}).get(stage.name, default)), 4096, f"{module.__name__} {module.__version__}",
                )  # fmt: skip
                module.plans[path] = (plan, piece.graph, bundle.path)
                data = plan_bytes(path, group)
                (bundle.path / path).write_bytes(data)
                files.append(FileEntry(path, len(data), hashlib.sha256(data).hexdigest()))
                plans.append(plan)
        stages.append(replace(stage, plans=tuple(plans)))
    listed = tuple(name for name in ARCHITECTURES if any(name in group for group in architectures))
    target = Target(module.backend, listed)
    recipe = replace(bundle.manifest.recipe, shapes=SHAPES)
    changes = {"target": target, "stages": tuple(stages), "recipe": recipe, "files": tuple(files)}
    return Bundle(bundle.path, replace(bundle.manifest, **changes))


def plan_bytes(path: str, architectures: Sequence[str]) -> bytes:
    """A plan's file: a header as TensorRT-RTX writes it, then the name by which the fake finds the graph."""
    payload = json.dumps({"path": path}).encode()
    mask = architecture_mask([name for name in architectures if "rtx" in ARCHITECTURES[name].backends])
    header = struct.pack("<4s12xQ4B4xI", b"vtrt", 64 + len(payload), 1, 7, 1, 116, mask).ljust(64, b"\0")
    return header + payload
