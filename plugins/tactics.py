"""Which kernels are compiled for which GPU architecture, with which tiles: data only, chosen by what compiles cleanly.

A tactic is one choice of tiles. TensorRT times all tactics of a plugin on the GPU it builds on and keeps the fastest;
every plugin that has larger ones also offers one that needs no more than 48 KB of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from reelforge.plugins.schema import PLUGINS, PV_16BIT, PV_FP8, PV_FP8_FP16_ACCUMULATOR, DType, PluginSchema


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture as far as kernels depend on it.

    Attributes:
        number: Compute capability without the point.
        target: ptxas's name; the "a" stands for instructions of this architecture alone.
        ptx_version: Times ten: the oldest that knows the instructions, so that older drivers take it too.
        shared_limit: Largest shared memory of a block in bytes.
        score_instruction: Tensor-core instruction of the int8 product, as SASS calls it.
        fp8_instruction: That of the e4m3 product; None if there is none.
    """

    number: int
    target: str
    ptx_version: int
    shared_limit: int
    score_instruction: str
    fp8_instruction: str | None


ARCHITECTURES: Mapping[int, Architecture] = MappingProxyType(
    {
        item.number: item
        for item in (
            Architecture(80, "sm_80", 84, 163 << 10, "IMMA", None),
            Architecture(86, "sm_86", 84, 99 << 10, "IMMA", None),
            Architecture(89, "sm_89", 87, 99 << 10, "IMMA", "QMMA"),
            Architecture(90, "sm_90a", 84, 227 << 10, "IGMMA", "QGMMA"),
            Architecture(100, "sm_100a", 87, 227 << 10, "UTCIMMA", "UTCQMMA"),
            Architecture(120, "sm_120a", 88, 99 << 10, "IMMA", "QMMA"),
        )
    }
)


@dataclass(frozen=True)
class Tactic:
    """One choice of tiles.

    Attributes:
        warps: Of a block.
        stages: Key blocks in flight; 1 where nothing is pipelined.
        tiles: Compile-time constants that the tactic decides.
    """

    warps: int
    stages: int
    tiles: Mapping[str, int]

    @property
    def name(self) -> str:
        """Short name: tile sizes, warps, stages."""
        return "x".join(str(size) for size in self.tiles.values()) + f"w{self.warps}s{self.stages}"


def _attention_tactic(block_m: int, block_n: int, warps: int, stages: int) -> Tactic:
    return Tactic(warps, stages, MappingProxyType({"BLOCK_M": block_m, "BLOCK_N": block_n}))


# Each key block's sum is a register per element of the output tile, beside the output itself: that leaves room for 64
# rows per four warps. On Hopper two such blocks share a multiprocessor: one's softmax overlaps the other's products. On
# the others four warps alone need a few registers too many.
_SMALL_TILES = (_attention_tactic(128, 64, 8, 2), _attention_tactic(128, 64, 8, 3))
_HOPPER_TILES = (
    _attention_tactic(64, 64, 4, 2),
    _attention_tactic(64, 128, 4, 3),
    _attention_tactic(128, 128, 8, 3),
)
_KEY_STATISTICS = (Tactic(4, 1, MappingProxyType({"ROWS": 32})),)
_VALUE_STATISTICS = (Tactic(8, 1, MappingProxyType({"ROWS": 64})),)
_QUANTISE_KEYS = (Tactic(8, 1, MappingProxyType({})), Tactic(16, 1, MappingProxyType({})))
_QUANTISE_VALUES = (Tactic(8, 1, MappingProxyType({})),)


def tactics(plugin: str, architecture: int) -> tuple[Tactic, ...]:
    """Return the tactics of ``plugin`` on an architecture; none where it does not exist."""
    schema = PLUGINS[plugin]
    has_fp8 = ARCHITECTURES[architecture].fp8_instruction is not None
    if schema.kernel == "rotary_quantise":
        return _KEY_STATISTICS if "statistics" in plugin else _QUANTISE_KEYS
    if not has_fp8 and schema.constants.get("PV") != PV_16BIT:
        return ()
    if schema.kernel == "value_quantise":
        return _VALUE_STATISTICS if "statistics" in plugin else _QUANTISE_VALUES
    pv = schema.constants["PV"]
    tiles: tuple[Tactic, ...] = _SMALL_TILES
    if pv == PV_FP8_FP16_ACCUMULATOR and architecture in (90, 100):
        tiles = ()  # an fp16 accumulator is no faster there
    elif architecture == 90:
        tiles = _HOPPER_TILES if pv == PV_FP8 else ()
    elif has_fp8 == (pv == PV_16BIT):
        tiles = ()
    if schema.kernel == "block_sparse_attention":
        # Where a key block's number is itself loaded, the compiler halves how far ahead it loads.
        tiles = tuple(replace(tactic, stages=2 * tactic.stages - 1) for tactic in tiles)
    return tiles


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    Attributes:
        plugin: A key of PLUGINS.
        architecture: A key of ARCHITECTURES.
        tactic: One of :func:`tactics`.
        activation: Type of 16-bit tensors.
        head_dim: One of HEAD_DIMS.
        attributes: Values that differ from the schema's defaults, by attribute name, sorted.
    """

    plugin: str
    architecture: int
    tactic: Tactic
    activation: DType = DType.BFLOAT16
    head_dim: int = 128
    attributes: tuple[tuple[str, int | float], ...] = ()

    @property
    def schema(self) -> PluginSchema:
        """The plugin's schema."""
        return PLUGINS[self.plugin]

    @property
    def name(self) -> str:
        """A name that no other variant has."""
        parts = [self.plugin, f"sm{self.architecture}", self.tactic.name, self.activation.triton_name]
        parts += [f"d{self.head_dim}", *(f"{key}{value:g}" for key, value in self.attributes)]
        return "-".join(part for part in parts if part)

    def constants(self) -> dict[str, int | float]:
        """Return every compile-time constant of the kernel.

        Raises:
            ValueError: If an attribute is unknown or has a value that is not among its choices.
        """
        given = dict(self.attributes)
        constants: dict[str, int | float] = {"HEAD_DIM": self.head_dim, **self.schema.constants}
        for attribute in self.schema.attributes:
            value = given.pop(attribute.name, attribute.default)
            if attribute.choices and value not in attribute.choices:
                raise ValueError(f"{self.plugin}: {attribute.name}={value:g}, expected one of {attribute.choices}")
            constants[attribute.constant] = value
        if given:
            raise ValueError(f"{self.plugin} has no attributes {', '.join(sorted(given))}")
        constants |= self.tactic.tiles
        if "STAGES" in self._kernel_constants():
            constants["STAGES"] = self.tactic.stages
        return constants

    def _kernel_constants(self) -> set[str]:
        return {"STAGES"} if "PV" in self.schema.constants else set()


def variants(
    architecture: int, activation: DType = DType.BFLOAT16, head_dim: int = 128, plugin: str | None = None
) -> Iterator[Variant]:
    """Yield every variant of an architecture: all plugins, or one, with the attributes that its tactics ask for."""
    for name in PLUGINS if plugin is None else (plugin,):
        for tactic in tactics(name, architecture):
            for attributes in _attribute_choices(name, tactic, architecture):
                yield Variant(name, architecture, tactic, activation, head_dim, attributes)


def _attribute_choices(
    plugin: str, tactic: Tactic, architecture: int
) -> tuple[tuple[tuple[str, int | float], ...], ...]:
    key_group = tactic.tiles.get("BLOCK_N")
    if key_group is not None:
        return (() if key_group == 64 else (("key_group", key_group),),)
    if plugin == "rotary_qk_norm_quantise" and architecture == 90:
        return ((), (("key_group", 128),))
    if plugin == "value_quantise" and architecture not in (90, 100):
        return ((), (("value_range", 2.25),))
    return ((),)
