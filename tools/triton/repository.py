"""Writing a model repository: a folder per model, complete in itself, in place by one rename.

A graph and the weights it names lie in the model's own folder, because ONNX Runtime follows neither links nor paths out
of it; hard links cost nothing where bundle and repository are on one file system. The module does not know what
configurations mean.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reelforge.runtime.budget import parse_budget
from reelforge.runtime.bundle.copying import copy_with_holes
from reelforge.runtime.bundle.open import MANIFEST_NAME, Bundle
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.manifest import StageEntry
from reelforge.tools.triton.layout import Layout, decide_layout, parts_of
from reelforge.tools.triton.model_config import Config, ensemble_config, graph_config, pipeline_config, plan_config
from reelforge.tools.triton.text_format import text_of

VERSION = "1"
CONFIG_NAME = "config.pbtxt"
MODEL_FILE = '''"""What Triton loads. The model itself is in the package, to be installed for Triton's Python."""

from reelforge.tools.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True)
class ExportRequest:
    """What to write.

    Attributes:
        output: The repository's folder; it must not exist.
        name: Of the pipeline's model, and the beginning of all others' names.
        inside: Stages to run inside the pipeline's model, or ``all``.
        instances: How many videos are made at once.
        memory_budget: For stages inside; nothing for the default.
        copy: Whether files are copied even where they could be linked.
    """

    output: Path
    name: str = "reelforge"
    inside: tuple[str, ...] = ()
    instances: int = 1
    memory_budget: str = ""
    copy: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written: the models' names, where each stage runs, and bytes that were linked and copied."""

    models: tuple[str, ...]
    layout: Layout
    linked_bytes: int
    copied_bytes: int


def export_repository(bundle: Bundle, request: ExportRequest) -> Exported:
    """Write the model repository of a bundle.

    Raises:
        RequestError: For a name, a stage or a budget that cannot be.
        BuildError: If the folder exists or cannot be written. Nothing is left then.
    """
    if not _NAME.fullmatch(request.name):
        raise RequestError(
            "the model's name cannot be used.",
            received=repr(request.name),
            expected="a letter, then letters, digits, _ and -",
            fix="write for example --name reelforge",
        )
    if request.memory_budget:
        parse_budget(request.memory_budget)
    bundle.stage("dit")
    layout = decide_layout(bundle.manifest, request.inside)
    with _new_folder(request.output) as partial:
        writer = _Writer(bundle, partial, request)
        models = {stage: writer.stage(bundle.stage(stage)) for stage in layout.models}
        writer.pipeline(models, layout)
        names = tuple(sorted(path.name for path in partial.iterdir()))
    return Exported(names, layout, writer.linked_bytes, writer.copied_bytes)


class _Writer:
    def __init__(self, bundle: Bundle, root: Path, request: ExportRequest) -> None:
        self.linked_bytes = self.copied_bytes = 0
        self._bundle = bundle
        self._root = root
        self._request = request

    def stage(self, stage: StageEntry) -> str:
        """Write a stage's model, and return its name."""
        name = f"{self._request.name}_{stage.name}"
        if not stage.plans:
            folder = self._model(name, graph_config(name, stage, self._bundle.manifest.target.backend))
            for path in dict.fromkeys([stage.graph, *(weight.file for weight in stage.weights)]):
                self._bring(path, folder / path)
            return name
        parts = {}
        for plans in parts_of(stage):
            part = name if plans[0].parts == 1 else f"{name}_{plans[0].part}"
            parts[part] = plans
            files = {key: Path(plan.path).name for plan in plans for key in plan.architectures}
            folder = self._model(part, plan_config(part, plans, files))
            for plan in plans:
                self._bring(plan.path, folder / Path(plan.path).name)
        if list(parts) != [name]:
            self._model(name, ensemble_config(name, stage, parts))
        return name

    def pipeline(self, models: Mapping[str, str], layout: Layout) -> None:
        """Write the model that chains the stages."""
        target, request = self._bundle.manifest.target, self._request
        config = pipeline_config(
            request.name, models, layout.inside, target.backend, request.instances, request.memory_budget
        )
        folder = self._model(request.name, config)
        (folder / "model.py").write_text(MODEL_FILE, encoding="utf-8")
        for path in carried_files(self._bundle, layout.inside):
            self._bring(path, folder / "bundle" / path)

    def _model(self, name: str, config: Config) -> Path:
        folder = self._root / name / VERSION  # an ensemble has an empty one
        folder.mkdir(parents=True)
        (folder.parent / CONFIG_NAME).write_text(text_of(config), encoding="utf-8")
        return folder

    def _bring(self, path: str, target: Path) -> None:
        source = self._bundle.path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self._request.copy:
            try:
                os.link(source.resolve(), target)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
            else:
                self.linked_bytes += target.stat().st_size
                return
        copy_with_holes(source, target)
        self.copied_bytes += target.stat().st_size


def carried_files(bundle: Bundle, inside: tuple[str, ...]) -> list[str]:
    """Return the files of a bundle that its pipeline needs: manifest, tokenizers, and those of stages inside."""
    paths = [MANIFEST_NAME, *(file.path for file in bundle.manifest.files if file.path.startswith("tokenizers/"))]
    for name in inside:
        stage = bundle.stage(name)
        plans = [plan.path for plan in stage.plans]
        paths += plans or [stage.graph, *(weight.file for weight in stage.weights)]
    return list(dict.fromkeys(paths))


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """Give a folder that becomes ``destination`` if the block ends well, and is removed if it does not."""
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 - a symbolic link stays as the user wrote it
    partial = destination.with_name(f"{destination.name}.partial-{os.getpid()}")
    try:
        if os.path.lexists(destination):
            raise _exists(destination)
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if os.path.lexists(destination):  # os.rename would replace an empty folder
            raise _exists(destination)
        os.rename(partial, destination)  # noqa: PTH104 - the atomic step, spelt as the system call
    except OSError as error:
        full = error.errno in _FULL_DISK
        raise BuildError(
            f"the model repository cannot be written to {str(destination)!r}: {error.strerror or error}.",
            received=f"{shutil.disk_usage(_existing(destination)).free:,} bytes free" if full else str(error.filename),
            expected="more free space" if full else "a folder that this user may write",
            fix="choose another destination with -o; what was written has been removed",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _exists(destination: Path) -> BuildError:
    return BuildError(
        f"the output folder {str(destination)!r} exists.",
        expected="a path where nothing is yet",
        fix="remove it, or choose another destination with -o",
    )
