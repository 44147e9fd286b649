"""PlanCache: plans of earlier builds, found by what they were compiled from.

A plan's key covers everything that its bytes and its receipt follow from, and nothing else: paths, prompt template,
tokenizers, and how a checkpoint's files are cut do not enter. Changing the template therefore compiles nothing again,
and changing one layer's scale compiles one stage.

Only plans are kept. Quantised weights are not: their key would be the digest of the weights that they come from, and
reading and hashing those takes most of the time that quantising them does (``benchmarks/quantisation.md``).

The module knows what a plan follows from. Where the files lie is the matter of ``export.cache_store``.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reelforge.export.cache_store import CachedEntry, DamagedEntryError, EntryStore, NoRoomError
from reelforge.export.engines.request import PlanRequest
from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.receipt import RECEIPT_VERSION

DEFAULT_LIMIT_BYTES = 50 * 10**9
_PLACES = ("graph", "plan", "receipt", "scratch")  # of a PlanRequest: where files lie, not what is in them
_COMPILER, _OURS = "reelforge.export.engines.child", ("reelforge.export", "reelforge.plugins")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Build = Callable[[Path, Path], None]


@dataclass(frozen=True)
class PlanKey:
    """Everything that a plan and its receipt follow from.

    Attributes:
        request: What is to be compiled. All its fields enter but the paths, so that a field added to it enters too.
        graph_digest: Of the stage's graph, or of the part's, by ``export.graph_file.graph_digest``: it covers every
            weight by its digest, and not in which file it lies.
        backend: Library and version, ``tensorrt_rtx 1.7.1.116``.
        device: Name of the GPU on which the compiler times kernels; empty where it needs none.
        builder: Digest of our own code that compiles, by :func:`builder_digest`.
    """

    request: PlanRequest
    graph_digest: str
    backend: str
    device: str = ""
    builder: str = field(default_factory=lambda: builder_digest())

    def content(self) -> dict[str, Any]:
        """Return what the key covers, as JSON types."""
        request = to_json(self.request)
        for name in _PLACES:
            del request[name]
        request["target"]["architectures"].sort(key=tuple(ARCHITECTURES).index)  # sets, whatever their order
        request["expected"]["decomposed"].sort()
        return {
            "builder": self.builder,
            "receipt_version": RECEIPT_VERSION,
            "request": request,
            "graph_digest": self.graph_digest,
            "backend": self.backend,
            "device": self.device,
        }

    @property
    def sha256(self) -> str:
        """The key itself."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


class PlanCache:
    """Plans and receipts of earlier builds in a folder that any number of builds may use at once.

    Args:
        folder: Is made if needed.
        limit_bytes: How large the cache may become; what was not used for longest is removed.
        notice: Told what a person should know.

    Raises:
        BuildError: If the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        notice: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self.folder = folder
        self._notice = notice
        try:
            self._store = EntryStore(folder, limit_bytes)
        except OSError as error:
            raise BuildError(
                f"the cache folder {str(folder)!r} cannot be used: {error.strerror or error}.",
                received=str(folder),
                expected="a folder that this user may write",
                fix="choose another with --cache-dir, or build with --no-cache",
            ) from error

    def fetch_or_build(self, key: PlanKey, build: Build, plan: Path, receipt: Path) -> bool:
        """Bring a plan and its receipt to ``plan`` and ``receipt``, compiling them only if the cache has none.

        While another build compiles the same plan, this one waits, and takes it then; if that build fails or is killed,
        this one compiles. A plan that cannot be kept (the disk is full, it is larger than the cache may be) is a notice
        and no error: the bundle has it.

        Args:
            key: What the plan follows from.
            build: Compiles into the two paths that it is given, ``plan`` and ``receipt``.
            plan: Must not exist; its folder must. A plan from the cache is a hard link where that is possible.
            receipt: Likewise; always a copy.

        Returns:
            Whether it came from the cache.

        Raises:
            OSError: If ``plan`` and ``receipt`` cannot be written; neither is left.
        """
        stage = key.request.stage
        with ExitStack() as stack:
            try:
                stack.enter_context(self._store.locked(key.sha256, lambda: self._notice(_waiting(stage))))
            except OSError as error:
                self._notice(f"the plan cache is not used for stage {stage}: {error.strerror or error}.")
                build(plan, receipt)
                return False
            if self._take(key, plan, receipt):
                return True
            build(plan, receipt)
            self._keep(key, plan, receipt)
        return False

    def entries(self) -> list[CachedEntry]:
        """Return what the cache holds, the entry that was not used for longest first."""
        return self._store.entries()

    def trim(self, limit_bytes: int) -> bool:
        """Remove what was not used for longest until at most ``limit_bytes`` are left; return whether they are."""
        return self._store.trim(limit_bytes)

    def _take(self, key: PlanKey, plan: Path, receipt: Path) -> bool:
        try:
            return self._store.take(key.sha256, plan, receipt)
        except DamagedEntryError as error:
            self._notice(f"the cached plan of stage {key.request.stage} is damaged ({error}); it is compiled again.")
            return False

    def _keep(self, key: PlanKey, plan: Path, receipt: Path) -> None:
        kept = f"the plan of stage {key.request.stage} is not kept in the cache {str(self.folder)!r}"
        try:
            self._store.keep(key.sha256, key.content(), plan, receipt)
        except NoRoomError:
            size, limit = plan.stat().st_size, self._store.limit_bytes
            self._notice(f"{kept}: it has {size:,} bytes, and the cache may have {limit:,} in all (--cache-size).")
        except OSError as error:
            self._notice(f"{kept}: {error.strerror or error}.")


def builder_digest() -> str:
    """Return the sha256 of the source code that compiles a plan: the child process's, and all of ours that it imports.

    What the builder asks of the compiler, and how it reads the answer, is in the code and in no request. A number to
    raise by hand would be forgotten once, and stale plans be taken for years; a changed comment costs a build. Modules
    of ``runtime`` hold data and messages, and are left out; of what they define, :data:`RECEIPT_VERSION` is in the key.
    """
    sources: dict[str, bytes] = {}
    todo = [_COMPILER]
    while todo:
        name = todo.pop()
        path = _source(name)
        if name in sources or path is None:
            continue
        sources[name] = path.read_bytes()
        for node in ast.walk(ast.parse(sources[name])):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith(_OURS):
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    digests = {name: hashlib.sha256(source).hexdigest() for name, source in sources.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _source(name: str) -> Path | None:
    """Return the file of one of our modules, without importing it; None if ``name`` is something in a module."""
    path = Path(__file__).parents[1].joinpath(*name.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def parse_size(text: str) -> int:
    """Read a number of bytes as ``--cache-size`` takes it: ``50GB``, ``1.5TB``, ``800MB``, ``64GiB``, ``0``.

    Raises:
        RequestError: If it is something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise RequestError(
            f"the size {text!r} cannot be read.",
            received=text,
            expected="a number with B, kB, MB, GB, TB (powers of 1000), KiB, MiB or GiB",
            fix="write for example 50GB",
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _waiting(stage: str) -> str:
    return f"another build compiles the same plan of stage {stage}; waiting for it."
