"""One pipeline on one device: what a replica of the deployment is.

A job runs in a thread, and what it says is passed on in batches; when nobody wants it any longer, the thread is stopped
before its next unit of work. The module knows neither HTTP nor the jobs' store, and imports no Ray.
"""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from reelforge.runtime.bundle.open import Check
from reelforge.runtime.control import Stop
from reelforge.runtime.errors import BundleError, ReelforgeError
from reelforge.runtime.events import Frames
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.request import Request
from reelforge.runtime.video import VideoWriter
from reelforge.tools.service.resuming import ResumingPipeline
from reelforge.tools.service.settings import Settings
from reelforge.tools.service_ray.messages import Began, Failed, Finished, Message, Piece

_PIECE_BYTES = 4 << 20

Tell = Callable[[Message], None]


class PipelineReplica:
    """Makes videos, one at a time.

    Args:
        settings: The bundle, which lies at the same path on every machine, and what a pipeline may take.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pipeline = Pipeline.open(
            settings.bundle, None, settings.threads, Check(settings.check), settings.memory_budget
        )
        self._resuming = ResumingPipeline(self._pipeline)
        self._turn = asyncio.Lock()

    async def make(self, request: Request, digest: str, kept: str) -> AsyncGenerator[list[Message], None]:
        """Make a video; the last message says how it ended.

        Args:
            request: What to make.
            digest: The content digest of the bundle that the job was accepted for.
            kept: The folder for latents of interrupted attempts, which is used where this machine has it.

        Yields:
            What has happened since the last time, in order.
        """
        async with self._turn:
            loop, said = asyncio.get_running_loop(), asyncio.Queue[Message]()
            stop = Stop()

            def tell(message: Message) -> None:
                loop.call_soon_threadsafe(said.put_nowait, message)

            thread = threading.Thread(target=self._work, args=(request, digest, Path(kept), stop, tell), daemon=True)
            thread.start()
            try:
                ended = False
                while not ended:
                    batch = [await said.get()]
                    while not said.empty():
                        batch.append(said.get_nowait())
                    ended = isinstance(batch[-1], Finished | Failed)
                    yield batch
            finally:
                stop.set("nobody waits for it any longer", keep=True)
                while thread.is_alive():  # the pipeline must be free before the next job; nothing here may be cancelled
                    thread.join(0.05)

    def _work(self, request: Request, digest: str, kept: Path, stop: Stop, tell: Tell) -> None:
        """Make a video and say how it ended, whatever happens."""
        last: Message
        try:
            tell(Began(platform.node(), os.getpid()))
            last = self._make(request, digest, kept, stop, tell)
        except ReelforgeError as error:
            last = Failed.of(error)
        except MemoryError:
            last = Failed("OutOfMemoryError", "the machine is out of memory.", None, "", "")
        except BaseException as error:
            last = Failed("EngineError", f"a replica met a bug: {error!r}.", None, "", "see the replica's log")
            raise
        finally:
            tell(last)

    def _make(self, request: Request, digest: str, kept: Path, stop: Stop, tell: Tell) -> Finished:
        manifest = self._pipeline.bundle.manifest
        if manifest.content_digest != digest:
            raise BundleError(
                f"the bundle on {platform.node()} is not the one that the service has.",
                received=manifest.content_digest,
                expected=digest,
                fix="copy the same bundle to the same path on every machine",
            )
        shape = self._resuming.resolve(request).shape
        # The folder's name is the job's: where it exists, it is the service's own, on this machine or shared.
        latents = kept / f"{digest[:16]}.npy" if kept.is_dir() else None
        with tempfile.TemporaryDirectory(prefix="reelforge-") as folder:
            path = Path(folder) / "video.mp4"
            rate = self._pipeline.spec.defaults.frames_per_second
            events = self._resuming.stream(request, save_latents=latents, stop=stop, previews=self._settings.previews)
            with VideoWriter(path, shape.height, shape.width, shape.frames, rate) as video:
                for event in events:
                    if isinstance(event, Frames):
                        video.write(event.pixels)
                    else:
                        tell(event)
            with path.open("rb") as file:
                while data := file.read(_PIECE_BYTES):
                    tell(Piece(data))
            return Finished(path.stat().st_size)
