"""A bundle from prompt to frames: text encoders, conditioning for all steps, sampling loop, tiled decoding.

The module knows the stages' names and how they are chained. What a stage is told is made in ``stage_inputs``, which
engines are in memory is decided in ``residency``, how a loop steps is in ``sampling``. It knows no video files
(``runtime.video``) and no queue (``runtime.scheduling``): one video at a time, and who asks second waits.

Each phase is a generator that yields what it has to say and returns what it made, so that whoever consumes
:meth:`Pipeline.stream` decides when the next unit of work begins, and closing it is stopping.

Letters: ``C`` channels, ``T`` ``H`` ``W`` latent frames, rows and columns, ``n`` steps.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from reelforge.runtime.budget import LEAST, parse_budget
from reelforge.runtime.bundle.check import Check
from reelforge.runtime.control import Stop
from reelforge.runtime.decode import check_latents, decoding
from reelforge.runtime.devices import device_index
from reelforge.runtime.dimensions import video_sizes
from reelforge.runtime.engines.engine import Engine, EngineOptions
from reelforge.runtime.engines.narrow_weights import Widening
from reelforge.runtime.events import Event, FloatArray, Frames, Notice, Pixels, Progress
from reelforge.runtime.latents_file import writable, write_final
from reelforge.runtime.preview import ColourMap, Previews
from reelforge.runtime.prompt_stages import conditioning, encoding, result_of
from reelforge.runtime.request import Request, ResolvedRequest, resolve_request
from reelforge.runtime.resume import check_first_step, keep_stopped, kept
from reelforge.runtime.sample import Keep, sampling
from reelforge.runtime.sampling import SamplingError
from reelforge.runtime.turns import Turns

if TYPE_CHECKING:
    from reelforge.runtime.bundle.open import Bundle
    from reelforge.runtime.engines.device_session import DeviceSession
    from reelforge.runtime.memo import Memos
    from reelforge.runtime.stage_inputs import Conditions, TextEncoding
    from reelforge.runtime.stages import Statistics

MEMO_BYTES = 1 << 30
"""What is remembered without a choice; 50 steps of the full size are 0.4 GB of conditions per prompt."""

OnProgress = Callable[[Progress], None]


class Pipeline:
    """Generates videos from one bundle. Make one with :meth:`open`.

    Example::

        with Pipeline.open("my.bundle") as pipeline:
            frames = pipeline.generate(Request("a red ball", steps=20))  # uint8 [frames, height, width, 3]
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions | None = None,
        memory_budget: int | str | None = LEAST,
        memo_bytes: int = 0,
        memos: Memos | None = None,
    ) -> None:
        # Imported with the first bundle: a program that only names the class starts in half the time.
        from reelforge.runtime.stage_inputs import StageInputs
        from reelforge.runtime.stages import Stages

        self.bundle = bundle
        self.options = options or EngineOptions()
        self.spec = bundle.manifest.spec
        self.inputs = StageInputs(bundle)
        self._session: DeviceSession | None = None
        self._turns = Turns()
        self._colours = ColourMap(self.spec.vae)
        self._stages = Stages(
            bundle, self.options, lambda: self._device(), parse_budget(memory_budget), memos or memo_bytes
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: str | None = None,
        threads: int | None = None,
        check: Check = Check.FULL,
        memory_budget: int | str | None = None,
        memo_bytes: int = MEMO_BYTES,
        memos: Memos | None = None,
        widening: Widening = Widening.AUTO,
    ) -> Self:
        """Open a bundle for generation.

        Args:
            path: The bundle's folder.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None means the first that the bundle was built for.
            threads: Threads per operator; None means one per core.
            check: How thoroughly the bundle is checked.
            memory_budget: What loaded stages may take where they compute: bytes, ``"20GiB"``, or ``"least"``, one
                stage at a time. None means half of the host's available memory, or nine tenths of the GPU's (see
                ``runtime.budget``, also for what is not counted).
            memo_bytes: What of text encodings and conditions is kept in the host's memory for requests that repeat
                prompts or schedules.
            memos: Where they are kept instead, together with those of other pipelines of this bundle.
            widening: When the loop's 16-bit weights become float32 on the CPU.

        Raises:
            BundleError: If the bundle is damaged, of another schema version, or lacks a stage.
            RequestError: If the bundle was not built for the device, or the budget does not suffice for some stage.
        """
        from reelforge.runtime.bundle.open import Bundle

        bundle = Bundle.open(path, check)
        index = 0 if device is None else device_index(device, bundle.manifest.target.backend, bundle.name)
        return cls(bundle, EngineOptions(threads, device=index, widening=widening), memory_budget, memo_bytes, memos)

    def statistics(self) -> Statistics:
        """Return what the pipeline holds, and how often it had to load a stage or could remember an answer."""
        return self._stages.statistics()

    def resolve(self, request: Request) -> ResolvedRequest:
        """Check a request and fill in the bundle's defaults.

        Raises:
            RequestError: Listing everything that the bundle does not support, or saying that the budget is too small.
        """
        resolved = resolve_request(request, self.bundle.manifest, self.bundle.name)
        sizes = video_sizes(self.spec, resolved.shape, resolved.steps)
        self._stages.check_budget(sizes, f"a video of {resolved.shape}")
        return resolved

    def check_noise(self, request: ResolvedRequest, latents: FloatArray) -> None:
        """Raise a ``RequestError`` if a caller's own noise does not have the request's shape, or is not finite."""
        self.inputs.initial_latents(request, latents)

    def generate(
        self,
        request: Request,
        on_progress: OnProgress | None = None,
        latents: FloatArray | None = None,
        save_latents: str | Path | None = None,
        stop: Stop | None = None,
    ) -> Pixels:
        """Generate a video.

        Args:
            request: What to generate.
            on_progress: Told about every finished unit of work.
            latents: Initial noise ``[1, C, T, H, W]`` float32 instead of the seed's.
            save_latents: A ``.npy`` file for the final latents, written before decoding begins.
            stop: Ends the work early.

        Returns:
            uint8 ``[frames, height, width, 3]``, RGB.

        Raises:
            ReelforgeError: As :meth:`stream`.
        """
        batches = []
        for event in self.stream(request, latents, save_latents, stop):
            if isinstance(event, Frames):
                batches.append(event.pixels)
            elif isinstance(event, Progress) and on_progress is not None:
                on_progress(event)
        return np.concatenate(batches)

    def stream(
        self,
        request: Request,
        latents: FloatArray | None = None,
        save_latents: str | Path | None = None,
        stop: Stop | None = None,
        previews: bool = False,
        first_step: int = 0,
    ) -> Generator[Event, None, None]:
        """Like :meth:`generate`, but yield every event: progress, notices, and frames as soon as they are final.

        The request is checked at once; work begins when the first event is asked for. Closing the generator ends it.

        Args:
            request: What to generate.
            latents: Initial noise ``[1, C, T, H, W]`` float32 instead of the seed's.
            save_latents: A ``.npy`` file for the final latents, written before decoding begins. If a step fails, what
                the steps before it made is written beside it.
            stop: Ends the work early; with ``keep``, the latents of the loop are written like those of one that fails.
            previews: Show in the progress what the latents look like (see ``runtime.preview``).
            first_step: Begin the loop there, with ``latents`` as the step before left them (``SamplingError.step``).

        Raises:
            RequestError: If the bundle does not support the request.
            EngineError: If an engine fails.
            OutputError: If ``save_latents`` cannot be written: at once, or with the latents (``UnsavedLatentsError``).
            CancelledError: If ``stop`` was set, or its deadline has passed.
        """
        resolved = self.resolve(request)
        check_first_step(first_step, resolved.steps, latents)
        initial = self.inputs.initial_latents(resolved, latents)
        return self._generation(resolved, initial, writable(save_latents), stop or Stop(), previews, first_step)

    async def generate_async(
        self,
        request: Request,
        latents: FloatArray | None = None,
        save_latents: str | Path | None = None,
        stop: Stop | None = None,
    ) -> Pixels:
        """:meth:`generate` in a thread; cancelling the task sets ``stop`` and ends the work within one unit of it."""
        from reelforge.runtime import asynchronous  # asyncio is slow to import, and most programs do without

        stop = stop or Stop()
        return await asynchronous.generate(lambda: self.generate(request, None, latents, save_latents, stop), stop)

    def stream_async(
        self,
        request: Request,
        latents: FloatArray | None = None,
        save_latents: str | Path | None = None,
        stop: Stop | None = None,
        previews: bool = False,
        first_step: int = 0,
    ) -> AsyncGenerator[Event, None]:
        """:meth:`stream` for ``async for``: made in a thread, one event ahead of the consumer and no more."""
        from reelforge.runtime import asynchronous

        self.resolve(request)
        stop = stop or Stop()
        begin = partial(self.stream, request, latents, save_latents, stop, previews, first_step)
        return asynchronous.stream(begin, stop)

    def encode_text(self, prompt: str) -> TextEncoding:
        """Run both text encoders on a prompt.

        Raises:
            RequestError: If the prompt is not valid Unicode text.
            EngineError: If an engine fails.
        """
        with self._turns.take(Stop()):
            return result_of(self._encoding(prompt, Stop()))

    def prepare(self, prompts: Sequence[str], stop: Stop | None = None) -> None:
        """Encode prompts of requests to come, each encoder loaded once, where anything is remembered at all.

        Raises:
            RequestError: If a prompt is not valid Unicode text.
            EngineError: If an engine fails.
            CancelledError: If ``stop`` was set, or its deadline has passed.
        """
        stop = stop or Stop()
        with self._turns.take(stop):
            self._stages.watch.check_tokenizers()
            texts = [self.inputs.text(prompt) for prompt in prompts]
            self._stages.answer_ahead(self.engine, "llm", [text.llm for text in texts], stop)
            self._stages.answer_ahead(self.engine, "clip", [text.clip for text in texts], stop)

    def condition(self, request: ResolvedRequest, text: TextEncoding) -> Conditions:
        """Compute everything that ``dit`` is told besides the latents, for all steps at once.

        Raises:
            EngineError: If an engine fails.
        """
        with self._turns.take(Stop()):
            return result_of(self._conditioning(request, text, Stop()))

    def sample(self, request: ResolvedRequest, conditions: Conditions, latents: FloatArray | None = None) -> FloatArray:
        """Run the sampling loop and return the final latents ``[1, C, T, H, W]``.

        Args:
            request: Gives the shape and, if ``latents`` is None, the seed.
            conditions: From :meth:`condition`.
            latents: Initial noise instead of the seed's.

        Raises:
            RequestError: If ``latents`` does not have the request's shape.
            EngineError: If the engine fails or its numbers are not finite.
        """
        with self._turns.take(Stop()):
            return result_of(self._sampling(request, conditions, self.inputs.initial_latents(request, latents), Stop()))

    def decode(self, latents: FloatArray) -> Iterator[FloatArray]:
        """Decode final latents ``[1, C, T, H, W]``.

        Yields:
            float32 ``[some frames, height, width, 3]`` in [0, 1], in order.

        Raises:
            RequestError: If the latents are not those of a video of this model.
            DecodingError: If the engine fails.
        """
        for event in self.stream_decode(latents):
            if isinstance(event, Frames):
                yield event.values

    def stream_decode(self, latents: FloatArray, stop: Stop | None = None) -> Generator[Event, None, None]:
        """Like :meth:`decode`, but yield every event; to finish a generation whose decoding failed.

        Raises:
            RequestError: If the latents are not those of a video of this model.
            DecodingError: If the engine fails.
            CancelledError: If ``stop`` was set, or its deadline has passed.
        """
        check_latents(latents, self.spec)
        stop = stop or Stop()
        with self._turns.take(stop):
            yield from self._decoding(latents, stop)

    @contextmanager
    def engine(self, stage: str) -> Iterator[Engine]:
        """Lend a stage's engine for the duration of a ``with`` block.

        Raises:
            BundleError: If a file of the stage was altered since the bundle was opened.
            EngineError: If it cannot be loaded, or this process is not the one that opened the pipeline.
        """
        with self._stages.lease(stage) as engine:
            yield engine

    def close(self) -> None:
        """Give back engines and GPU; a later use of the pipeline opens them again. Closing twice is harmless."""
        if self._stages.is_forked:
            return
        self._stages.close()
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generation(
        self,
        request: ResolvedRequest,
        latents: FloatArray,
        saved: Path | None,
        stop: Stop,
        previews: bool,
        first_step: int,
    ) -> Generator[Event, None, None]:
        with self._turns.take(stop):
            self._stages.expect(video_sizes(self.spec, request.shape, request.steps))
            text = yield from self._encoding(request.prompt, stop)
            yield from map(Notice, text.notices)
            conditions = yield from self._conditioning(request, text, stop)
            if request.negative_prompt is not None:
                away_from = result_of(self._encoding(request.negative_prompt, stop))
                yield from (Notice(one.replace("the prompt", "the negative prompt", 1)) for one in away_from.notices)
                conditions = replace(conditions, negative=result_of(self._conditioning(request, away_from, stop)))
            shown = Previews(self._colours, request.steps, request.shift) if previews else None
            try:
                keep = None if saved is None else partial(keep_stopped, stop, saved)
                final = yield from self._sampling(request, conditions, latents, stop, first_step, shown, keep)
            except SamplingError as error:
                raise error if saved is None else kept(error, saved) from error.__cause__
            if saved is not None:
                write_final(saved, final)
            frames = self._decoding(final, stop, "" if saved is None else str(saved))
            yield from self._colours.learning(final, frames) if previews else frames

    def _encoding(self, prompt: str, stop: Stop) -> Generator[Event, None, TextEncoding]:
        self._stages.watch.check_tokenizers()
        return encoding(prompt, self.inputs, partial(self._stages.answer, self.engine), stop)

    def _conditioning(
        self, request: ResolvedRequest, text: TextEncoding, stop: Stop
    ) -> Generator[Event, None, Conditions]:
        return conditioning(request, text, self.inputs, partial(self._stages.answer, self.engine), stop)

    def _sampling(
        self,
        request: ResolvedRequest,
        conditions: Conditions,
        latents: FloatArray,
        stop: Stop,
        first_step: int = 0,
        previews: Previews | None = None,
        keep: Keep | None = None,
    ) -> Generator[Event, None, FloatArray]:
        make_room = self._stages.residency.make_room
        return sampling(request, conditions, latents, self.engine, stop, make_room, first_step, previews, keep)

    def _decoding(self, latents: FloatArray, stop: Stop, saved: str = "") -> Generator[Event, None, None]:
        lend = partial(self.engine, "vae_decoder")
        return decoding(latents, lend, self.spec, stop, self._stages.residency.make_room, saved)

    def _device(self) -> DeviceSession:
        """Return the GPU's session, which all stages share."""
        if self._session is None:
            from reelforge.runtime.engines.device_session import open_session

            self._session = open_session(self.bundle.manifest.target.backend, self.options.device)
        return self._session
