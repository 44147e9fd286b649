"""What a request says about step caching, as data, and how the command line writes it.

``off``, ``easycache:0.025``, ``easycache:0.1,reuse=residual,warmup=2``, ``magcache:0.12,ratios=model.json``,
``teacache:0.1,coefficients=model.json,max-skips=4``. The module knows the settings' names and ranges, and no engines.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from reelforge.runtime.errors import RequestError
from reelforge.runtime.step_cache.ratios import MagnitudeRatios
from reelforge.runtime.step_cache.rescaling import Rescaling

REUSE_STAGE, CHANGE_STAGE, INPUT_STAGE = "step_reuse", "step_change", "input_change"
HEAD_CHANGE_STAGE, TOKEN_REUSE_STAGE = "head_change", "token_reuse"
PARTS = ("dit_head", "dit_body", "dit_tail")
PARTED_STAGES = (*PARTS, HEAD_CHANGE_STAGE, TOKEN_REUSE_STAGE)
"""Those that a bundle has only if it was built with ``--partition``."""

Word = TypeVar("Word", bound=enum.Enum)


class Method(enum.Enum):
    """What decides that a step is skipped."""

    EASYCACHE = "easycache"
    MAGCACHE = "magcache"
    TEACACHE = "teacache"
    FBCACHE = "fbcache"


class Reuse(enum.Enum):
    """What a skipped step takes for its velocity; ``x`` are latents, ``v`` velocities, ``c`` the last computed step.

    That a line through computed values is nearer than the last of them was shown for features by TaylorSeer (arXiv
    2503.06923), and is what ``benchmarks/step_cache.md`` finds for velocities.
    """

    EXTRAPOLATE = "extrapolate"  # the line in sigma through the last two computed velocities, as far as these are apart
    RESIDUAL = "residual"  # v_c + (x - x_c): as EasyCache and MagCache were published
    VELOCITY = "velocity"  # v_c
    TOKENS = "tokens"  # what the body added to the head's image: as TeaCache and first-block cache were published


_WARMUP_SHARE = {Method.EASYCACHE: 0.1, Method.MAGCACHE: 0.2, Method.TEACACHE: 0.0, Method.FBCACHE: 0.0}
_MAX_SKIPS = {Method.EASYCACHE: 3, Method.MAGCACHE: 4, Method.TEACACHE: 3, Method.FBCACHE: 3}
_ASKED = {
    Method.EASYCACHE: (CHANGE_STAGE,),
    Method.MAGCACHE: (),
    Method.TEACACHE: (INPUT_STAGE,),
    Method.FBCACHE: (HEAD_CHANGE_STAGE,),
}
"""The stages that a criterion asks."""
_MEASURED = {"ratios": (Method.MAGCACHE, "measure-ratios"), "coefficients": (Method.TEACACHE, "measure-coefficients")}
"""What is measured of a checkpoint: for which method, and by which command."""
LEAST_WARMUP = 2
"""The change of the velocity is known after two evaluations."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a setting."""

    received: str
    expected: str
    fix: str


@dataclass(frozen=True)
class StepCache:
    """Which steps may reuse what earlier steps computed. The last step is always computed.

    Args:
        method: What decides.
        threshold: Estimated error, accumulated since the last computed step, at which a step is computed again: of
            EasyCache and TeaCache relative to the velocity, of MagCache of the residual's magnitude; of first-block
            cache the change of what the first block adds since the last computed step. 0 computes every step.
        warmup: How many first steps are always computed, at least 2. None means the papers' share, a tenth of the
            steps for EasyCache (5 of 50 there), a fifth for MagCache and, where they have none, 2.
        reuse: What stands for a skipped step's velocity. The papers keep the residual.
        max_skips: Longest run of skipped steps. None means the paper's 4 for MagCache, and 3 for the others, whose
            papers have no limit: what is predicted from two steps far behind can be far off.
        ratios: The checkpoint's magnitude ratios, for MagCache.
        coefficients: The checkpoint's polynomial, for TeaCache. None means the published one, of the released model.
    """

    method: Method
    threshold: float
    warmup: int | None = None
    reuse: Reuse = Reuse.EXTRAPOLATE
    max_skips: int | None = None
    ratios: MagnitudeRatios | None = None
    coefficients: Rescaling | None = None

    @classmethod
    def parse(cls, text: str, *, files: bool = True) -> StepCache:
        """Read ``METHOD:THRESHOLD[,NAME=VALUE...]``, or ``off``; a file that is named is read at once.

        Args:
            text: What was said.
            files: Whether who said it may name files of this machine.

        Raises:
            RequestError: If the text has another form, or a file cannot be read or must not be named.
        """
        if text.strip() == "off":
            return OFF
        head, *options = text.split(",")
        word, _, number = head.partition(":")
        method = _word(Method, word.strip(), text)
        settings = dict(_option(option, text) for option in options)
        if len(settings) != len(options):
            raise _unreadable(text, "each setting once")
        named = sorted(settings.keys() & _MEASURED.keys())
        if named and not files:
            raise RequestError(
                f"step caching with {' and '.join(named)} names a file, which this request may not.",
                received=f"{', '.join(named)} in the request",
                expected="settings without files",
                fix="leave it out, or let the bundle have a default: build-engine --step-cache",
            )
        ratios, coefficients = settings.get("ratios"), settings.get("coefficients")
        return cls(
            method,
            _number(number, text),
            _whole("warmup", settings, text),
            _word(Reuse, settings.get("reuse", Reuse.EXTRAPOLATE.value), text),
            _whole("max-skips", settings, text),
            None if ratios is None else MagnitudeRatios.read(Path(ratios)),
            None if coefficients is None else Rescaling.read(Path(coefficients)),
        )

    def first_steps(self, steps: int) -> int:
        """Return how many first steps are always computed."""
        share = math.ceil(_WARMUP_SHARE[self.method] * steps)
        return max(LEAST_WARMUP, share if self.warmup is None else self.warmup)

    def longest_run(self) -> int:
        """Return how many steps may be skipped one after the other."""
        return _MAX_SKIPS[self.method] if self.max_skips is None else self.max_skips

    @property
    def parted(self) -> bool:
        """Whether steps are taken with head, body and tail of ``dit`` instead of the whole."""
        return self.method is Method.FBCACHE or self.reuse is Reuse.TOKENS

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that a bundle must have for it, besides ``dit``."""
        reuse = TOKEN_REUSE_STAGE if self.reuse is Reuse.TOKENS else REUSE_STAGE
        return (*(PARTS if self.parted else ()), *_ASKED[self.method], reuse)

    def lacks_coefficients(self) -> bool:
        """Whether the method needs coefficients and has none."""
        return self.method is Method.TEACACHE and self.coefficients is None

    def problems(self) -> list[Problem]:
        """Return what is wrong with the settings."""
        if not isinstance(self.method, Method):
            return [_problem("method", self.method, "a Method", "Method.EASYCACHE")]
        found = []
        if not isinstance(self.reuse, Reuse):
            found.append(_problem("reuse", self.reuse, "a Reuse", "Reuse.EXTRAPOLATE"))
        if type(self.threshold) not in (int, float) or not math.isfinite(self.threshold) or self.threshold < 0:
            found.append(_problem("threshold", self.threshold, "a finite number of at least 0", "0.025"))
        if self.warmup is not None and (type(self.warmup) is not int or self.warmup < LEAST_WARMUP):
            found.append(_problem("warmup", self.warmup, f"a whole number of at least {LEAST_WARMUP}", LEAST_WARMUP))
        if self.max_skips is not None and (type(self.max_skips) is not int or self.max_skips < 1):
            found.append(_problem("max_skips", self.max_skips, "a whole number of at least 1", 4))
        if self.method is Method.MAGCACHE and self.ratios is None:
            fix = "write ratios=FILE with a file from reelforge measure-ratios"
            found.append(Problem("magcache without ratios", "magcache with the ratios of the checkpoint", fix))
        for name, (method, command) in _MEASURED.items():
            measured: MagnitudeRatios | Rescaling | None = getattr(self, name)
            if measured is None:
                continue
            if self.method is not method:
                fix = f"leave {name} out"
                found.append(Problem(f"{name} with {self.method.value}", f"{name} with {method.value} only", fix))
            if wrong := measured.problem():
                found.append(Problem(f"{name}: {wrong}", f"{name} from reelforge {command}", "measure them again"))
        return found


OFF = StepCache(Method.EASYCACHE, 0.0)
"""Every step is computed, also with a bundle whose default is another."""


def _problem(name: str, value: object, expected: str, example: object) -> Problem:
    return Problem(f"{name}={value!r}", f"{name} {expected}", f"use for example {name}={example}")


def _option(option: str, text: str) -> tuple[str, str]:
    name, separator, value = (part.strip() for part in option.partition("="))
    if not separator or name not in ("warmup", "reuse", "max-skips", *_MEASURED):
        raise _unreadable(text, "settings among warmup=, reuse=, max-skips=, ratios=, coefficients=")
    return name, value


def _word(words: type[Word], text: str, whole: str) -> Word:
    try:
        return words(text)
    except ValueError:
        raise _unreadable(whole, " or ".join(str(word.value) for word in words)) from None


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _unreadable(whole, "a threshold after the method's name and a colon") from None


def _whole(name: str, settings: dict[str, str], text: str) -> int | None:
    if name not in settings:
        return None
    try:
        return int(settings[name])
    except ValueError:
        raise _unreadable(text, f"{name}= with a whole number") from None


def _unreadable(text: str, expected: str) -> RequestError:
    return RequestError(
        f"the step cache {text!r} cannot be read.",
        received=text,
        expected=expected,
        fix="write for example easycache:0.025, or magcache:0.12,ratios=model.json",
    )
