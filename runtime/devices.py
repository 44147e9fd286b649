"""What a user calls a device, ``cpu`` or ``cuda:1``, as the number that engines take.

The module opens no device.
"""

from __future__ import annotations

import re

from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Backend

_CUDA = re.compile(r"cuda(?::(\d{1,3}))?")


def device_index(device: str, backend: Backend, bundle_name: str) -> int:
    """Return the number of the GPU that ``device`` names, 0 for the CPU.

    Args:
        device: ``"cpu"``, ``"cuda"`` (the first GPU) or ``"cuda:N"``.
        backend: What the bundle was built for.
        bundle_name: For the message.

    Raises:
        RequestError: If it is no device, or not one that the bundle was built for.
    """
    found = _CUDA.fullmatch(device)
    on_gpu = backend is not Backend.CPU
    if on_gpu and found:
        return int(found[1] or 0)
    if not on_gpu and device == "cpu":
        return 0
    raise RequestError(
        f"bundle {bundle_name!r} cannot run on this device.",
        received=f"device={device!r}",
        expected="cuda or cuda:N, since the bundle was built for a GPU" if on_gpu else "cpu, as the bundle was built",
        fix=f"use device={'cuda:0' if on_gpu else 'cpu'!r}, or rebuild with another --target",
    )
