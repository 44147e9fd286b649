"""Plans of a stage: which of them a GPU takes, one of them loaded, and the profile that sizes choose.

The module knows one plan at a time; ``tensorrt_engine`` chains a stage's parts and owns the tensors' memory.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path

from reelforge.runtime.cuda.driver import DeviceInfo
from reelforge.runtime.cuda.memory import DeviceBuffer
from reelforge.runtime.engines.device_session import DeviceSession
from reelforge.runtime.engines.kernel_cache import KernelCache
from reelforge.runtime.engines.tensorrt_library import DATA_TYPES, MODULES, CudaEngine, ExecutionContext
from reelforge.runtime.errors import EngineError, OutOfMemoryError
from reelforge.runtime.manifest import PlanEntry, ProfileEntry, StageEntry
from reelforge.runtime.plan_file import check_header

Shape = tuple[int, ...]


def choose_plans(entry: StageEntry, device: DeviceInfo) -> tuple[PlanEntry, ...]:
    """Return the parts of a stage that this GPU runs, in order.

    Raises:
        EngineError: If no plan was compiled for the GPU, or parts are missing.
    """
    fitting = [plan for plan in entry.plans if device.architecture in plan.architectures]
    if not fitting:
        groups = dict.fromkeys("+".join(plan.architectures) for plan in entry.plans)
        raise EngineError(
            f"stage {entry.name!r} has no plan for GPU {device.ordinal} ({device.name}).",
            received=device.architecture,
            expected=" or ".join(groups) or "a bundle with plans",
            fix=f"rebuild the bundle with --target for {device.architecture}",
        )
    parts = sorted(fitting, key=lambda plan: plan.part)
    if [plan.part for plan in parts] != list(range(parts[0].parts)) or len({plan.parts for plan in parts}) != 1:
        raise EngineError(
            f"the plans of stage {entry.name!r} for {device.architecture} are not one whole.",
            received=f"parts {[plan.part for plan in parts]}",
            expected=f"parts 0 to {parts[0].parts - 1}, each once",
            fix="rebuild the bundle with build-engine",
        )
    return tuple(parts)


def choose_profile(stage: str, plan: PlanEntry, sizes: Mapping[str, int]) -> int:
    """Return the index of the tightest profile that takes ``sizes``, the sizes of named dimensions.

    Raises:
        EngineError: If none does, listing what each takes.
    """

    def takes(profile: ProfileEntry) -> bool:
        ranges = profile.dimensions.items()
        return all(low <= sizes[name] <= high for name, (low, _, high) in ranges if name in sizes)

    fitting = [index for index, profile in enumerate(plan.profiles) if takes(profile)]
    if not fitting:
        raise EngineError(
            f"stage {stage!r} has no profile for these sizes.",
            received=_sizes(sizes),
            expected="; or ".join(f"{profile.name}: {_ranges(profile, sizes)}" for profile in plan.profiles),
            fix="use a size that the bundle was built for, or rebuild it with --shapes",
        )
    return min(fitting, key=lambda index: math.prod(high for _, _, high in plan.profiles[index].dimensions.values()))


class LoadedPlan:
    """One plan on the GPU, with its context. Make one with :func:`load_plan`.

    The library's objects are only here and never in a variable: an error that someone keeps also keeps the variables of
    the calls that it came through, and with them a plan's weights on the GPU.
    """

    def __init__(
        self, session: DeviceSession, stage: str, path: Path, plan: PlanEntry, kernels: KernelCache | None = None
    ) -> None:
        self.plan = plan
        self.what = f"stage {stage!r}" if plan.parts == 1 else f"part {plan.part} of stage {stage!r}"
        self._session = session
        self._stage = stage
        self._path = path
        self._kernels = kernels
        self._kept_shapes: set[tuple[int, tuple[Shape, ...]]] = set()  # those whose kernels are in the cache
        self._shapes: tuple[int, tuple[Shape, ...]] | None = None
        self._engine: CudaEngine | None = None
        self._context: ExecutionContext | None = None
        self._profile: int | None = None
        self._memory = (0, 0)

    def load(self) -> None:
        """Load the plan's file and make a context (see :func:`load_plan`)."""
        library = self._session.library
        try:
            # Mapped, not read: the library copies what it needs, and a plan may be larger than the machine's memory.
            with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._engine = library.deserialize(data)
        except (OSError, ValueError) as error:
            raise EngineError(f"the plan {self._path.name!r} of {self.what} cannot be read: {error}.") from error
        if self._engine is None:
            raise self._refused()
        self._check_signature(self._engine)
        self._context = library.create_context(self._engine, self._kernels)
        if self._context is None:
            raise self._refused()

    def prepare(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Choose profile and shapes, and return the outputs' shapes. Nothing of this plan may be running.

        Args:
            shapes: Of the inputs at least.

        Raises:
            EngineError: If no profile takes the sizes, or the library refuses them.
        """
        sizes = {
            dimension: size
            for info in self.plan.inputs
            for dimension, size in zip(info.shape, shapes[info.name], strict=True)
            if isinstance(dimension, str)
        }
        profile = choose_profile(self._stage, self.plan, sizes)
        if profile != self._profile:
            self._require(
                self._opened().set_optimization_profile_async(profile, self._session.stream),
                f"choose profile {profile}",
            )
            self._profile = profile
        self._shapes = (profile, tuple(shapes[info.name] for info in self.plan.inputs))
        for info in self.plan.inputs:
            shape = shapes[info.name]
            self._require(self._opened().set_input_shape(info.name, shape), f"take {info.name} {list(shape)}")
        try:
            missing = self._opened().infer_shapes()
        except RuntimeError as error:
            raise EngineError(
                f"{self.what} cannot infer its shapes.", received=f"{error}; {self._session.library.messages()}"
            ) from error
        self._require(not missing, f"infer its shapes without {', '.join(missing)}")
        outputs = {info.name: tuple(self._opened().get_tensor_shape(info.name)) for info in self.plan.outputs}
        for name, shape in outputs.items():
            self._require(min(shape, default=0) >= 0, f"know the shape of {name} before it runs ({list(shape)})")
        return outputs

    def activation_bytes(self) -> int:
        """Return what the chosen profile needs of the arena."""
        assert self._engine is not None
        assert self._profile is not None, "activation_bytes before prepare"
        return int(self._engine.get_device_memory_size_for_profile_v2(self._profile))

    def bind(self, addresses: Mapping[str, int], activations: DeviceBuffer) -> None:
        """Say where the tensors are, and ``activations``, at least :meth:`activation_bytes` of them."""
        for info in (*self.plan.inputs, *self.plan.outputs):
            self._require(
                self._opened().set_tensor_address(info.name, addresses[info.name]), f"take the address {info.name}"
            )
        memory = (activations.address, activations.size_bytes)
        if self._memory != memory:
            self._memory = memory
            self._opened().set_device_memory(*self._memory)

    def enqueue(self) -> None:
        """Enqueue the plan on the session's stream.

        Raises:
            EngineError: If the library refuses; a fault on the GPU shows when the stream is synchronised.
        """
        if not self._opened().execute_async_v3(self._session.stream):
            raise EngineError(
                f"{self.what} failed in {self._session.library.name}.",
                received=self._session.library.messages(),
                expected="execute_async_v3 to return True",
            )

    def can_be_captured(self) -> bool:
        """Return whether a CUDA graph can hold the plan as it is prepared."""
        return self._session.library.can_capture(self._opened(), self._session.stream)

    def keep_kernels(self) -> None:
        """Keep what was compiled for the shapes that have just run; nothing may be running."""
        if self._kernels is not None and self._shapes is not None and self._shapes not in self._kept_shapes:
            self._kernels.save()
            self._kept_shapes.add(self._shapes)

    def close(self) -> None:
        """Release context, engine and kernel cache, in this order. Closing twice is harmless."""
        self._context = None
        self._engine = None
        if self._kernels is not None:
            self._kernels.close()

    def _opened(self) -> ExecutionContext:
        assert self._context is not None, "a plan was used after it was closed"
        return self._context

    def _require(self, done: bool, doing: str) -> None:
        if not done:
            raise EngineError(
                f"{self.what} cannot {doing}.",
                received=self._session.library.messages(),
                fix="rebuild the bundle with build-engine",
            )

    def _check_signature(self, engine: CudaEngine) -> None:
        """The plan has the tensors and profiles that the manifest states, and all of them on the device."""
        module = self._session.library.module
        found = {}
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            place = "" if engine.get_tensor_location(name) == module.TensorLocation.DEVICE else " on the host"
            found[name] = f"{engine.get_tensor_mode(name).name} {engine.get_tensor_dtype(name).name}{place}"
        profiles = engine.num_optimization_profiles
        del engine
        groups = (("INPUT", self.plan.inputs), ("OUTPUT", self.plan.outputs))
        stated = {
            info.name: f"{mode} {DATA_TYPES.get(info.dtype, info.dtype)}" for mode, infos in groups for info in infos
        }
        if stated != found or profiles != len(self.plan.profiles):
            raise EngineError(
                f"the plan {self._path.name!r} has other tensors or profiles than its manifest states.",
                received=f"{profiles} profiles, {found}",
                expected=f"{len(self.plan.profiles)} profiles, {stated}",
                fix="rebuild the bundle with build-engine",
            )

    def _refused(self) -> EngineError:
        free, total = self._session.cuda.memory()
        device = self._session.cuda.device
        return EngineError(
            f"{self._session.library.name} refuses the plan {self._path.name!r} of {self.what}.",
            received=self._session.library.messages(),
            expected=f"a plan for {device.architecture} that fits into {free} of {total} bytes",
            fix="rebuild the bundle with build-engine",
        )


def load_plan(
    session: DeviceSession, stage: str, path: Path, plan: PlanEntry, kernels: KernelCache | None = None
) -> LoadedPlan:
    """Load one plan onto the session's GPU.

    Args:
        session: The GPU and the library.
        stage: The stage's name.
        path: The plan's file.
        plan: What the manifest says of it.
        kernels: What was compiled for this GPU before; None compiles it again.

    Raises:
        OutOfMemoryError: If the weights do not fit into the free memory.
        EngineError: If library and plan are of different versions, the library refuses the plan, or its tensors are not
            the manifest's.
        BundleError: If the file is no plan of that backend and those architectures.
    """
    library = session.library
    installed = f"{MODULES[library.backend]} {library.version}"
    if plan.backend != installed:
        raise EngineError(
            f"the plan {path.name!r} of stage {stage!r} was compiled by another version.",
            received=installed,
            expected=plan.backend,
            fix=f"pip install {'=='.join(plan.backend.split())}, or rebuild the bundle",
        )
    check_header(path, backend=library.backend, version=library.version, architecture=session.cuda.device.architecture)
    free, total = session.cuda.memory()
    if plan.weight_bytes > free:
        raise OutOfMemoryError(
            f"the weights of {path.name!r} do not fit into the memory of GPU {session.cuda.device.ordinal}.",
            received=f"{free} of {total} bytes free",
            expected=f"{plan.weight_bytes} bytes",
            fix="end other programs that use this GPU (nvidia-smi lists them), or build with a lower precision",
        )
    loaded = LoadedPlan(session, stage, path, plan, kernels)
    try:
        loaded.load()
    except BaseException:
        loaded.close()
        raise
    return loaded


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _ranges(profile: ProfileEntry, sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {low}..{high}" for name, (low, _, high) in profile.dimensions.items() if name in sizes)
