"""ONNX Runtime as a library: how it is imported, that it does not report what it runs, and that it computes exactly.

From 1.29 on its Linux builds send events to Microsoft by default, with names and digests of the models that are
loaded, and keep them and an identifier of the machine in the user's cache folder until they are sent (read off 1.31.1:
the files that a session leaves, and the address in the library). A server should not do that without having been asked
to, so it is off here, unless ``ORT_DISABLE_TELEMETRY`` is set to anything: then ONNX Runtime decides. Nothing is
imported before :func:`import_onnxruntime` is called.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"

EXACT_PRODUCTS = {"session.x64quantprecision": "1"}
"""A setting of sessions: constant int8 weights become uint8, whose products are exact and slower on old processors."""

_PROCESSORS = Path("/proc/cpuinfo")
_VNNI = {"avx512_vnni", "avx_vnni"}


def product_settings() -> dict[str, str]:
    """Return the settings with which layers in INT8 are computed exactly on this processor.

    x86 processors without VNNI add pairs of products of uint8 and int8 in 16 bits, which saturates. On others nothing
    is set: ONNX Runtime 1.31 changes the weights with VNNI too, to no effect. It is one of its extended optimisations,
    leaves products of two activations as they are, and refuses graphs whose layers share a constant. Where the system
    does not say what the processor has (not Linux), nothing is set either.
    """
    return EXACT_PRODUCTS if _lacks_vnni() else {}


def _lacks_vnni() -> bool:
    try:
        with _PROCESSORS.open(encoding="utf-8", errors="replace") as lines:
            flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    except OSError:
        return False
    return flags is not None and not _VNNI & set(flags)


def import_onnxruntime() -> ModuleType:
    """Import onnxruntime with its telemetry off, and return it.

    The variable is read when the library is loaded; a program that has imported onnxruntime itself, before a bundle is
    run, has to set it. Its events are switched off then, though the identifier has been written.

    Raises:
        ImportError: If it is not installed.
    """
    decided = TELEMETRY_SWITCH in os.environ
    os.environ.setdefault(TELEMETRY_SWITCH, "1")
    runtime = importlib.import_module("onnxruntime")
    if not decided:
        runtime.disable_telemetry_events()
    return runtime
