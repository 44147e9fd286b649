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
from types import ModuleType

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"

EXACT_PRODUCTS = {"session.x64quantprecision": "1"}
"""A setting of sessions on the CPU. x86 processors without VNNI add pairs of products of uint8 and int8 in 16 bits, and
that saturates; with it ONNX Runtime makes constant int8 weights uint8 there, whose products are exact and slower. It is
one of the extended optimisations, does nothing where VNNI is, and leaves products of two activations as they are."""


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
