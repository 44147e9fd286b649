"""What decides that a step is skipped: EasyCache, MagCache, TeaCache and first-block cache.

A criterion is asked about the steps between warm-up and the last one, in order, and told when one was computed. What it
has to know of tensors is computed by an engine; the host reads one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reelforge.runtime.engines.engine import Array, Engine
from reelforge.runtime.registers import Registers
from reelforge.runtime.step_cache.rescaling import Rescaling


class Criterion(Protocol):
    """Decides which steps are skipped."""

    def skips(self, registers: Registers, step: int) -> bool:
        """Return whether a step is skipped.

        Args:
            registers: Hold ``latents`` of this step and ``previous_latents`` of the step before; of the last two
                computed steps ``computed_latents`` with ``velocity``, and ``earlier_latents`` with
                ``earlier_velocity``.
            step: From 0.
        """
        ...

    def computed(self) -> None:
        """Take note that the velocity is computed now."""
        ...


class EasyCache:
    """Skips while the predicted change of the velocity is small (EasyCache, arXiv 2507.02860, section III).

    With ``k = |v_c - v_e| / |x_c - x_e|`` of the last two computed steps ``c`` and ``e``, ``|.|`` being the mean of
    absolute values, a step's velocity is taken to differ from that of the step before by ``k |x_i - x_{i-1}| / |v_c|``.
    These are added up from the last computed step on; at ``threshold`` a step is computed. The stage ``step_change``
    computes the summand.

    Args:
        change: The stage ``step_change``.
        threshold: The paper's tau, as a fraction.
        max_skips: Longest run of skipped steps; None means no limit, as in the paper.
    """

    def __init__(self, change: Engine, threshold: float, max_skips: int | None = None) -> None:
        self._change = change
        self._threshold = threshold
        self._max_skips = max_skips
        self._error = 0.0
        self._skips = 0

    def skips(self, registers: Registers, step: int) -> bool:  # noqa: ARG002
        """See :class:`Criterion`. A change that is not a number is never small."""
        registers.call(self._change, {name: name for name in self._change.inputs}, {"predicted_change": "change"})
        self._error += float(registers.read("change"))
        self._skips += 1
        return self._error < self._threshold and (self._max_skips is None or self._skips <= self._max_skips)

    def computed(self) -> None:
        """See :class:`Criterion`."""
        self._error = 0.0
        self._skips = 0


class MagCache:
    """Skips while the residual's magnitude has changed little, as is known beforehand (MagCache, arXiv 2506.09045).

    With the product ``g_i`` of the magnitude ratios since the last computed step, reusing that step's residual at step
    ``i`` is an error of about ``|1 - g_i|``. These are added up; at ``threshold`` a step is computed. The authors' code
    skips at the threshold too; here 0 means that nothing is skipped.

    Args:
        ratios: Of each step (see :class:`reelforge.runtime.step_cache.ratios.MagnitudeRatios`).
        threshold: The paper's delta.
        max_skips: The paper's K; None means no limit.
    """

    def __init__(self, ratios: Sequence[float], threshold: float, max_skips: int | None) -> None:
        self._ratios = ratios
        self._threshold = threshold
        self._max_skips = max_skips
        self.computed()

    def skips(self, registers: Registers, step: int) -> bool:  # noqa: ARG002
        """See :class:`Criterion`; the registers are not looked at."""
        self._magnitude *= float(self._ratios[step])
        self._error += abs(1.0 - self._magnitude)
        self._skips += 1
        return self._error < self._threshold and (self._max_skips is None or self._skips <= self._max_skips)

    def computed(self) -> None:
        """See :class:`Criterion`."""
        self._magnitude = 1.0
        self._error = 0.0
        self._skips = 0


class TeaCache:
    """Skips while what the first block is given has moved little (TeaCache, arXiv 2411.19108, section 3.3).

    How far it moved in each step, relatively and in means of absolute values, is what the stage ``input_change``
    computes; a polynomial of the checkpoint makes of it how far the velocity will have moved. These are added up from
    the last computed step on; at ``threshold`` a step is computed. Where the polynomial is negative, 0 is added.

    Args:
        change: The stage ``input_change``.
        modulation: ``[n, ...]``, ``double_modulation`` of all steps.
        rescaling: The checkpoint's polynomial.
        threshold: The paper's delta.
        max_skips: Longest run of skipped steps; None means no limit, as in the paper.
    """

    def __init__(
        self, change: Engine, modulation: Array, rescaling: Rescaling, threshold: float, max_skips: int | None = None
    ) -> None:
        self._change = change
        self._modulation = modulation
        self._rescaling = rescaling
        self._threshold = threshold
        self._max_skips = max_skips
        self.computed()

    def skips(self, registers: Registers, step: int) -> bool:
        """See :class:`Criterion`. A change that is not a number is never small."""
        self._error += self._rescaling.estimate(input_change(registers, self._change, self._modulation, step))
        self._skips += 1
        return self._error < self._threshold and (self._max_skips is None or self._skips <= self._max_skips)

    def computed(self) -> None:
        """See :class:`Criterion`."""
        self._error = 0.0
        self._skips = 0


class FirstBlockCache:
    """Skips while what the first block adds is what it added in the last computed step, nearly.

    First-block cache (ParaAttention, https://github.com/chengzeyi/ParaAttention): with the first block's residual
    ``r``, a step is computed if ``|r_i - r_c| / |r_c|`` has reached ``threshold``, ``|.|`` being the mean of absolute
    values. Nothing is added up. The stage ``head_change`` computes it; the head of the step must have run.

    Args:
        change: The stage ``head_change``.
        threshold: As there.
        max_skips: Longest run of skipped steps; None means no limit.
        prefix: Of the registers with the head's image.
    """

    def __init__(self, change: Engine, threshold: float, max_skips: int | None = None, prefix: str = "") -> None:
        self._change = change
        self._threshold = threshold
        self._max_skips = max_skips
        images = {name: prefix + name for name in ("head_image", "computed_head_image")}
        self._inputs = {"latents": "latents", "computed_latents": "computed_latents", **images}
        self._skips = 0

    def skips(self, registers: Registers, step: int) -> bool:  # noqa: ARG002
        """See :class:`Criterion`. A change that is not a number is never small."""
        registers.call(self._change, self._inputs, {"head_change": "change"})
        self._skips += 1
        small = float(registers.read("change")) < self._threshold
        return small and (self._max_skips is None or self._skips <= self._max_skips)

    def computed(self) -> None:
        """See :class:`Criterion`."""
        self._skips = 0


def input_change(registers: Registers, change: Engine, modulation: Array, step: int) -> float:
    """Return how far what the first block is given has moved since the step before.

    Args:
        registers: Hold ``latents`` of this step and ``previous_latents`` of the step before.
        change: The stage ``input_change``.
        modulation: ``[n, ...]``, ``double_modulation`` of all steps.
        step: From 1.
    """
    registers.write("double_modulation", modulation[step])
    registers.write("previous_modulation", modulation[step - 1])
    registers.call(change, {name: name for name in change.inputs}, {"input_change": "change"})
    return float(registers.read("change"))
