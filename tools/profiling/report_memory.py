"""The report's section on memory: its peaks by phase, and over time. Knows profiles and the charts' building blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reelforge.tools.profiling.report_charts import Area, Axis, Line, legend, number, plot, text
from reelforge.tools.profiling.report_steps import median_run, section
from reelforge.tools.profiling.schema import MemorySample, PhaseMemory, Profile

_MB = 1e6


def memory(profile: Profile) -> str:
    """Show peaks by phase, and resident memory over time, cold and warm."""
    content, on_gpu = "", False
    for title, record in (
        ("Cold run", next((one for one in profile.runs if one.temperature == "cold"), None)),
        ("Warm run, the median one", median_run(profile)),
    ):
        if record is None or len(record.memory) < 2:
            continue
        own = [(sample.at_ms, sample.anonymous_bytes / _MB) for sample in record.memory]
        both = [(at, up + sample.file_bytes / _MB) for (at, up), sample in zip(own, record.memory, strict=True)]
        device = _device_line(record.memory)
        on_gpu = on_gpu or bool(device)
        x = Axis(0.0, own[-1][0], "milliseconds")
        y = Axis(0.0, max(up for _, up in [*both, *device]) * 1.08, "MB")
        floor = [(at, 0.0) for at, _ in own]
        shapes: list[Line | Area] = [Area(floor, own, "dit"), Area(own, both, "host", 0.45)]
        if device:
            shapes.append(Line(device, "vae_decoder", 2.5))
        content += f"<h3>{text(title)}</h3>" + plot(x, y, shapes)
    entries = [("its own (anonymous)", "dit"), ("mapped files: libraries, weights", "host")]
    about = "Resident memory of the process."
    if on_gpu:
        entries.append(("in use of the GPU", "vae_decoder"))
        about = "Resident memory of the process, and what is in use of the GPU, by other programs too."
    charts = legend(entries) + content if content else ""
    peaks = _peaks(profile)
    return section("Memory", about, peaks + charts) if peaks or charts else ""


def _device_line(samples: Sequence[MemorySample]) -> list[tuple[float, float]]:
    return [(sample.at_ms, sample.device_bytes / _MB) for sample in samples if sample.device_bytes is not None]


def _peaks(profile: Profile) -> str:
    """Return a table of the largest memory by phase."""
    cold, warm = (
        {phase.phase: phase for phase in (summary.memory if summary else ())}
        for summary in (profile.cold, profile.warm)
    )
    phases = dict.fromkeys([*cold, *warm])
    if not phases:
        return ""
    shown = [(name, peaks) for name, peaks in (("cold", cold), ("warm", warm)) if peaks]
    kinds = ["own", "files", *(["GPU"] if any(_on_gpu(peaks.values()) for _, peaks in shown) else [])]
    head = "".join(f"<th>{name}, {kind}</th>" for name, _ in shown for kind in kinds)
    rows = "".join(
        f"<tr><td>{text(phase)}</td>"
        + "".join(f"<td>{cell}</td>" for _, peaks in shown for cell in _cells(peaks.get(phase), len(kinds)))
        + "</tr>"
        for phase in phases
    )
    return f'<h3>Peaks by phase, MB</h3><div class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def _on_gpu(peaks: Iterable[PhaseMemory]) -> bool:
    return any(peak.device_bytes is not None for peak in peaks)


def _cells(peak: PhaseMemory | None, count: int) -> list[str]:
    if peak is None:
        return [""] * count
    sizes = (peak.anonymous_bytes, peak.file_bytes, peak.device_bytes)
    return ["" if size is None else number(size / _MB) for size in sizes[:count]]
