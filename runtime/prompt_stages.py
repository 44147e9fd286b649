"""From a prompt to what the transformer is told: the four stages before the loop, in their order.

Each function is a phase (see ``runtime.pipeline``). Who computes a stage's answer, or remembers it, is the caller's
matter: the module knows the stages' names and chain, and no engines.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, TypeVar

from reelforge.runtime.control import Stop
from reelforge.runtime.engines.engine import Array
from reelforge.runtime.events import Event, Progress

if TYPE_CHECKING:
    from reelforge.runtime.request import ResolvedRequest
    from reelforge.runtime.stage_inputs import Conditions, StageInputs, TextEncoding

Ask = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]
"""A stage and its inputs to its outputs, which nobody alters."""

Result = TypeVar("Result")


def encoding(prompt: str, inputs: StageInputs, ask: Ask, stop: Stop) -> Generator[Event, None, TextEncoding]:
    """Encode a prompt."""
    texts = inputs.text(prompt)
    stop.check("stage 'llm'")
    states = ask("llm", texts.llm)["prompt_states"]
    yield Progress("text", 1, 2)
    stop.check("stage 'clip'")
    pooled = ask("clip", texts.clip)["pooled_text"]
    yield Progress("text", 2, 2)
    return inputs.text_encoding(texts, states, pooled)


def conditioning(
    request: ResolvedRequest, text: TextEncoding, inputs: StageInputs, ask: Ask, stop: Stop
) -> Generator[Event, None, Conditions]:
    """Compute what ``dit`` is told, for all steps at once."""
    stop.check("stage 'refiner'")
    refined = ask("refiner", inputs.refiner(request, text))["text"]
    yield Progress("conditioning", 1, 2)
    stop.check("stage 'modulation'")
    vectors = ask("modulation", inputs.modulation(request, text))
    yield Progress("conditioning", 2, 2)
    return inputs.conditions(request, refined, vectors)


def result_of(phase: Generator[Event, None, Result]) -> Result:
    """Run a phase to its end, and return what it made."""
    while True:
        try:
            next(phase)
        except StopIteration as stop:
            result: Result = stop.value
            return result
