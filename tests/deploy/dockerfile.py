"""Just enough of a Dockerfile's grammar to look at one and to run its commands in a folder.

Comments, continued lines, stages, and the JSON form of commands; no heredocs, no ONBUILD, no escape directive. What the
project's Dockerfiles do not use is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORDS = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL", "USER", "VOLUME",
    "WORKDIR",
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction: its word, and everything behind it on one line."""

    word: str
    rest: str

    def exec_form(self) -> list[str]:
        """Return the arguments of a command in the JSON form."""
        value = json.loads(self.rest[self.rest.index("[") :])
        assert isinstance(value, list)
        assert all(isinstance(one, str) for one in value)
        return value

    def settings(self) -> dict[str, str]:
        """Return what ENV sets; values have no spaces."""
        return dict(re.findall(r"([A-Z_]+)=(\S+)", self.rest))


@dataclass(frozen=True)
class Stage:
    """A stage: its base, its name if it has one, and its instructions behind FROM."""

    base: str
    name: str
    instructions: tuple[Instruction, ...]

    def all(self, word: str) -> list[Instruction]:
        """Return the instructions of that kind, in order."""
        return [one for one in self.instructions if one.word == word]

    def one(self, word: str) -> Instruction:
        """Return the only instruction of that kind."""
        (found,) = self.all(word)
        return found


def stages_of(path: Path) -> list[Stage]:
    """Read the stages of a Dockerfile."""
    stages: list[Stage] = []
    for one in _instructions(path.read_text(encoding="utf-8")):
        assert one.word in WORDS, one
        if one.word == "FROM":
            base, _, name = one.rest.partition(" AS ")
            stages.append(Stage(base.strip(), name.strip(), ()))
        else:
            last = stages[-1]
            stages[-1] = Stage(last.base, last.name, (*last.instructions, one))
    return stages


def _instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield Instruction(word, rest.strip())
