"""GPUs by name: memory, bandwidth and dense arithmetic rates, each from a document of the maker.

Rates are per second without sparsity and with fp32 accumulation where the document tells the two apart, at the clocks
that the document assumes. The table does not know what a kernel reaches of them (see ``kernels``), nor what a card
reports that a vendor has clocked otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision

_GIB, _TERA, _GIGA = 2**30, 1e12, 1e9
_ECC_SHARE = 15 / 16  # GDDR6 without spare chips keeps its error correction in the memory itself

_TURING = "NVIDIA Turing GPU Architecture (WP-09183-001), T4 column"
_AMPERE = "NVIDIA A100 datasheet; A100 Tensor Core GPU Architecture, table 1"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture V2.1, appendix A"
_ADA = "NVIDIA Ada GPU Architecture V2.1, appendices A-C"
_AD106 = f"NVIDIA GeForce RTX 4060 Ti specifications (4352 cores at 2.535 GHz, 288 GB/s); rates per core as in {_ADA}"
_HOPPER = "NVIDIA H100 datasheet; H100 Tensor Core GPU Architecture, table 2"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture V1.1, appendix A"


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As people write it.
        architecture: ``sm89`` and so on.
        memory_bytes: What programs can allocate at most, before any of it is used.
        bandwidth: Bytes per second of its memory.
        rates: Operations per second by precision; one that is missing is not supported.
        source: The document.
    """

    name: str
    architecture: str
    memory_bytes: int
    bandwidth: float
    rates: Mapping[str, float]
    source: str

    def rate(self, precision: Precision) -> float:
        """Return dense operations per second.

        Raises:
            RequestError: If the GPU does not compute in ``precision``.
        """
        if precision.value not in self.rates:
            raise RequestError(
                f"{self.name} ({self.architecture}) does not compute in {precision.value}.",
                received=precision.value,
                expected=", ".join(self.rates),
                fix="choose another --precision, or another --gpu",
            )
        return self.rates[precision.value]


def _gpu(
    name: str,
    architecture: str,
    memory_gib: float,
    bandwidth_gb: float,
    fp32: float,
    half: float,
    eight_bit: Mapping[str, float],
    source: str,
    *,
    inline_ecc: bool = False,
) -> Gpu:
    """Make an entry; rates are in tera-operations per second, ``half`` is that of fp16 and, from sm80, of bf16."""
    rates = {"fp32": fp32, "fp16": half, **({"bf16": half} if architecture != "sm75" else {}), **eight_bit}
    memory = memory_gib * _GIB * (_ECC_SHARE if inline_ecc else 1)
    scaled = {precision: rate * _TERA for precision, rate in rates.items()}
    return Gpu(name, architecture, int(memory), bandwidth_gb * _GIGA, scaled, source)


def _eight(int8: float, fp8: float | None = None) -> dict[str, float]:
    return {"int8": int8} if fp8 is None else {"int8": int8, "fp8": fp8}


GPUS: tuple[Gpu, ...] = (
    _gpu("T4", "sm75", 16, 320, 8.1, 65, _eight(130), _TURING, inline_ecc=True),
    _gpu("A100 40GB", "sm80", 40, 1555, 19.5, 312, _eight(624), _AMPERE),
    _gpu("A100 80GB", "sm80", 80, 2039, 19.5, 312, _eight(624), _AMPERE),
    _gpu("A800 80GB", "sm80", 80, 2039, 19.5, 312, _eight(624), f"{_AMPERE} (the A800 differs in NVLink only)"),
    _gpu("A10", "sm86", 24, 600, 31.2, 125, _eight(250), "NVIDIA A10 datasheet", inline_ecc=True),
    _gpu("RTX 3090", "sm86", 24, 936, 35.6, 71, _eight(284), _GA102),
    _gpu("RTX 4060 Ti 16GB", "sm89", 16, 288, 22.1, 44.1, _eight(176.5, 88.2), _AD106),
    _gpu("RTX 4080", "sm89", 16, 716.8, 48.7, 97.5, _eight(389.9, 194.9), _ADA),
    _gpu("RTX 4090", "sm89", 24, 1008, 82.6, 165.2, _eight(660.6, 330.3), _ADA),
    _gpu("RTX 6000 Ada", "sm89", 48, 960, 91.1, 364.2, _eight(728.5, 728.5), _ADA),
    _gpu("L4", "sm89", 24, 300, 30.3, 121, _eight(242.5, 242.5), "NVIDIA L4 datasheet", inline_ecc=True),
    _gpu("L20", "sm89", 48, 864, 59.8, 119.5, _eight(239, 239), "NVIDIA L20 product brief", inline_ecc=True),
    _gpu("L40S", "sm89", 48, 864, 91.6, 362, _eight(733, 733), "NVIDIA L40S datasheet", inline_ecc=True),
    _gpu("H100 PCIe", "sm90", 80, 2000, 51.2, 756, _eight(1513, 1513), _HOPPER),
    _gpu("H100 SXM", "sm90", 80, 3350, 66.9, 989.4, _eight(1978.9, 1978.9), _HOPPER),
    _gpu("H200", "sm90", 140, 4800, 66.9, 989.4, _eight(1978.9, 1978.9), "NVIDIA H200 datasheet"),
    _gpu("B200", "sm100", 179, 8000, 75, 2250, _eight(4500, 4500), "NVIDIA DGX B200 datasheet"),
    _gpu("RTX 5080", "sm120", 16, 960, 56.3, 112.6, _eight(450.2, 225.1), _BLACKWELL),
    _gpu("RTX 5090", "sm120", 32, 1792, 104.8, 209.5, _eight(838, 419), _BLACKWELL),
    _gpu("RTX PRO 6000", "sm120", 96, 1792, 126, 503.8, _eight(1007.6, 1007.6), "NVIDIA RTX PRO 6000 datasheet"),
)

_ALIASES = {"a100": "A100 80GB", "a800": "A800 80GB", "h100": "H100 SXM"}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of that name, however it is spaced and capitalised (``rtx4090``, ``H100``).

    Raises:
        RequestError: If the table does not hold it.
    """
    wanted = _key(_ALIASES.get(_key(name), name))
    by_key = {_key(gpu.name): gpu for gpu in GPUS}
    found = by_key.get(wanted) or by_key.get(f"rtx{wanted}")
    if found is None:
        near = difflib.get_close_matches(wanted, by_key, 1)
        raise RequestError(
            f"the GPU {name!r} is not known.",
            received=name,
            expected=", ".join(gpu.name for gpu in GPUS),
            fix=f"use --gpu '{by_key[near[0]].name}'" if near else "use one of these, or leave --gpu out",
        )
    return found


def _key(name: str) -> str:
    return "".join(letter for letter in name.lower().removeprefix("nvidia").replace("geforce", "") if letter.isalnum())
