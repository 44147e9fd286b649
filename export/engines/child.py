"""The child process of a build: ``python -m reelforge.export.engines.child JOB.json DESCRIPTOR``.

Reads a :class:`PlanRequest`, compiles it, checks the plan against what is expected of it, and leaves plan and receipt
under their names; what it says goes through the pipe ``DESCRIPTOR``. Where it fails, it leaves neither. It dies when
its parent does. The module does not know why a plan is wanted.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from reelforge.export.engines.builder import BuiltPlan, build_plan
from reelforge.export.engines.channel import Sender
from reelforge.export.engines.check import check_plan
from reelforge.export.engines.module import backend_name, load_module
from reelforge.export.engines.plan_writer import partial_path
from reelforge.export.engines.request import PlanRequest
from reelforge.runtime.codec import from_json, to_json
from reelforge.runtime.errors import BuildError, ReelforgeError
from reelforge.runtime.receipt import RECEIPT_VERSION, Receipt

_PR_SET_PDEATHSIG = 1
FAILED = 3
"""Exit status after an error that was passed on."""


def main(arguments: list[str]) -> int:
    """Carry out one job."""
    job, descriptor = Path(arguments[0]), int(arguments[1])
    _die_with_parent()
    sender = Sender(descriptor)
    try:
        build(from_json(PlanRequest, json.loads(job.read_text())), sender)
    except ReelforgeError as error:
        sender.error(error)
        return FAILED
    return 0


def build(request: PlanRequest, sender: Sender) -> None:
    """Compile, check, and write plan and receipt.

    Raises:
        ReelforgeError: If one of these fails; nothing is left then.
    """
    module = load_module(request.target.backend)
    built = build_plan(module, request, sender.message, sender.step)
    try:
        check_plan(request.stage, built.information.profiles, request.expected)
        built.writer.finish()
        receipt = _receipt(request, built, backend_name(module))
        _write(Path(request.receipt), json.dumps(to_json(receipt), indent=1) + "\n")
    except BaseException:
        built.writer.discard()
        Path(request.plan).unlink(missing_ok=True)
        raise


def _receipt(request: PlanRequest, built: BuiltPlan, backend: str) -> Receipt:
    information = built.information
    names = [profile.name for profile in request.profiles]
    return Receipt(
        version=RECEIPT_VERSION,
        stage=request.stage,
        plan_sha256=built.writer.sha256,
        plan_bytes=built.writer.bytes,
        backend=backend,
        architectures=request.target.architectures,
        layers=information.profiles[0] if information.profiles else (),
        weight_bytes=information.weight_bytes if information.weight_bytes is not None else built.stored_bytes,
        activation_bytes=dict(zip(names, information.activation_bytes, strict=False)),
        build_seconds=round(built.seconds, 3),
    )


def _write(path: Path, text: str) -> None:
    partial = partial_path(path)
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BuildError(f"{path} cannot be written.", received=str(error), expected="room for the receipt") from error


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: a build may hold the memory of a whole machine."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
