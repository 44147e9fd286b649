"""The service's interface against its OpenAPI document, and its dependencies: parts of the service's benchmark."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path

from reelforge.tools.bench import report
from tests.tools.service.process import ServiceProcess

EXAMPLES = 100
LIMIT_S = 90
SERVE = ("fastapi", "prometheus-client", "uvicorn")
_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "ignored_auth",
)


def schemathesis_section(bundle: Path, work: Path) -> list[str]:
    """Let schemathesis loose on a real service: all its phases, sequences of requests included."""
    process = ServiceProcess(bundle, work / "schemathesis", threads=None)
    process.environment = {"REELFORGE_API_KEYS": "bench=a-key-of-the-benchmark"}
    path = work / "schemathesis.har"
    process.start()
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{process.url}/openapi.json", "--no-color"]
    command += ["--checks", ",".join(_CHECKS), "--max-examples", str(EXAMPLES), "--max-time", str(LIMIT_S)]
    command += ["--header", "Authorization: Bearer a-key-of-the-benchmark", "--seed", "9", "--continue-on-failure"]
    command += ["--report", "har", "--report-har-path", str(path), "--request-timeout", "60"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        process.terminate()
        code = process.wait()
    finally:
        process.stop()
    (work / "schemathesis.txt").write_text(finished.stdout + finished.stderr)
    entries = json.loads(path.read_text())["log"]["entries"]
    statuses = Counter(int(entry["response"]["status"]) for entry in entries)
    errors = sum(count for status, count in statuses.items() if status >= 500)
    failures = re.findall(r"^- (.+)$", finished.stdout, re.MULTILINE) if finished.returncode else []
    shown = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    return [
        *report.prose(
            f"`schemathesis run` with {EXAMPLES} examples per operation, at most {LIMIT_S} s, on a real service with a "
            f"key: {len(entries)} requests. Answers: {shown}. Checks: {', '.join(_CHECKS).replace('_', ' ')}. "
            f"The service's exit code when it was asked to end: {code}."
        ),
        "",
        *report.table(
            ("goal", "measured", ""),
            [
                ("no answer is a server's error", f"{errors} of {len(entries)}", "met" if not errors else "**missed**"),
                (
                    "answers are as documented",
                    f"{len(failures)} failures" + "".join(f"; {one}" for one in failures[:5]),
                    "met" if finished.returncode == 0 else "**missed**",
                ),
            ],
        ),
    ]


def audit_section(work: Path, auditor: str | None) -> list[str]:
    """Ask pip-audit about everything that the extra ``serve`` installs."""
    names = sorted(_closure(SERVE))
    pins = "".join(f"{name}=={distribution(name).version}\n" for name in names)
    (work / "requirements.txt").write_text(pins)
    listed = [f"What `reelforge[serve]` adds: {', '.join(pins.split())}."]
    if auditor is None:
        return [*report.prose(listed[0]), "", "Not audited: pass `--pip-audit PROGRAM`."]
    found = []
    for service in ("pypi", "osv"):
        command = [auditor, "-r", str(work / "requirements.txt"), "--no-deps", "--disable-pip", "-s", service]
        finished = subprocess.run([*command, "-f", "json"], capture_output=True, text=True, check=False, timeout=300)
        found.append((f"pip-audit, {service}", *_verdict(finished.stdout)))
    return [*report.prose(listed[0]), "", *report.table(("auditor", "seen", ""), found)]


def _verdict(output: str) -> tuple[str, str]:
    try:
        dependencies = json.loads(output)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        return "its database cannot be reached from this machine", "**not audited**"
    skipped = [one["name"] for one in dependencies if "skip_reason" in one]
    bad = [f"{one['name']} {hole['id']}" for one in dependencies for hole in one.get("vulns", [])]
    asked = len(dependencies) - len(skipped)
    if not asked:
        return "its database does not know these packages from this machine", "**not audited**"
    return f"{asked} packages, {len(skipped)} unknown: {', '.join(bad) or 'nothing'}", "**missed**" if bad else "met"


def _closure(names: tuple[str, ...]) -> set[str]:
    """Return packages and what they need, as they are installed here."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for need in distribution(name).requires or ():
            if ";" not in need:
                todo.append(re.split(r"[\[<>=!~ (;]", need)[0])
    return found
