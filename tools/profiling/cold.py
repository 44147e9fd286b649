"""A cold run: a new process imports, opens a bundle and generates once.

``python -m reelforge.tools.profiling.cold REQUEST RESULT`` is what the process runs: it reads a :class:`ColdRequest`
and writes a ``RunRecord``, both as JSON. Nothing of ours is imported before its clock runs.

:func:`run_cold` starts it. Before that the system is asked to drop the bundle's files from its page cache; a file that
another program has mapped stays there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reelforge.tools.profiling.recorder import MemorySampler, Recorder

_GRACE_S = 20.0


@dataclass(frozen=True)
class ColdRequest:
    """What the process is told.

    Attributes:
        origin_ns: Of the machine's monotonic clock, when it was started.
        bundle: The bundle's folder.
        check: As ``Bundle.open`` has it.
        request: A ``Request`` as JSON.
        options: ``EngineOptions`` as JSON.
        folder: For the video.
        ranges: Whether to announce NVTX ranges.
    """

    origin_ns: int
    bundle: str
    check: str
    request: Any
    options: Any
    folder: str
    ranges: bool


def drop_from_page_cache(folder: Path) -> bool:
    """Ask the system to forget the files of a folder; returns whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
    return True


def start_cold(request: ColdRequest, folder: Path) -> tuple[int, str, str]:
    """Run the process to its end and return its exit code, its result (empty if there is none), and its stderr.

    On Ctrl-C it is interrupted as well and given time to write what it has.

    Raises:
        KeyboardInterrupt: After that; the result is in ``folder / "cold.json"`` if it was written.
    """
    asked, result = folder / "request.json", folder / "cold.json"
    asked.write_text(json.dumps(request.__dict__), encoding="utf-8")
    command = [sys.executable, "-m", __name__, str(asked), str(result)]
    # A terminal's Ctrl-C goes to a whole group: here it would come twice, the second time while the result is written.
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            _, errors = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    text = result.read_text(encoding="utf-8") if result.exists() else ""
    return process.returncode, text, errors


def main(arguments: list[str]) -> int:
    """Do the cold run (see the module's docstring)."""
    begun_ns = time.perf_counter_ns()
    asked = ColdRequest(**json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    from reelforge.tools.profiling.recorder import MemorySampler, Recorder

    recorder = Recorder(origin_ns=asked.origin_ns)
    with MemorySampler(recorder) as sampler:
        return _run(asked, begun_ns, recorder, sampler, Path(arguments[1]))


def _run(asked: ColdRequest, begun_ns: int, recorder: Recorder, sampler: MemorySampler, result: Path) -> int:
    from reelforge.tools.profiling.schema import Kind

    recorder.add("start Python", Kind.START, "", 0.0, (begun_ns - asked.origin_ns) / 1e6)
    recorder.enter("import")
    with recorder.span("import runtime", Kind.IMPORT):
        from reelforge.runtime.bundle.open import Bundle, Check
        from reelforge.runtime.codec import from_json, to_json
        from reelforge.runtime.engines.engine import EngineOptions
        from reelforge.runtime.errors import ReelforgeError
        from reelforge.runtime.request import Request
        from reelforge.tools.profiling.instrument import ProfilingPipeline
        from reelforge.tools.profiling.measure import InterruptedRun, measure_run
        from reelforge.tools.profiling.nvtx_ranges import NO_RANGES, open_ranges
    try:
        recorder.enter("open")
        with recorder.span("open bundle", Kind.OPEN):
            bundle = Bundle.open(asked.bundle, Check(asked.check))
        recorder.enter("import")
        with recorder.span("import backend", Kind.IMPORT):
            import_backend(bundle.manifest.target.backend.value)
        options = from_json(EngineOptions, asked.options)
        recorder.use(open_ranges() if asked.ranges else NO_RANGES)
        with ProfilingPipeline(bundle, options, recorder) as pipeline:
            request = from_json(Request, asked.request)
            record = measure_run(pipeline, request, "cold", Path(asked.folder), recorder=recorder, sampler=sampler)
    except InterruptedRun as interrupted:
        record = interrupted.record
    except ReelforgeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result.write_text(json.dumps(to_json(record)), encoding="utf-8")
    return 0 if record.complete else 130


def import_backend(backend: str) -> None:
    """Import the library that runs a backend's engines; if it is missing, loading an engine will say so."""
    import importlib

    module = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}.get(backend, "onnxruntime")
    try:
        importlib.import_module(module)
    except (ImportError, OSError):
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
