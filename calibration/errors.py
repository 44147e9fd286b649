"""What can go wrong in a calibration, as errors with where, received, expected and fix.

The module does not know which layer was being observed: who does adds it with :meth:`NonFiniteError.located`.
"""

from __future__ import annotations

from reelforge.runtime.errors import ReelforgeError


class CalibrationError(ReelforgeError):
    """A calibration cannot be carried out, or a scale file is damaged or does not belong to what it is used for."""

    exit_code = 5


class NonFiniteError(CalibrationError):
    """Observed values hold NaN or infinities.

    Args:
        nan: How many elements are NaN.
        infinite: How many are plus or minus infinity.
        elements: How many there are in all.
        where: What holds them, as the subject of a sentence.
    """

    def __init__(self, nan: int, infinite: int, elements: int, where: str = "the observed tensor") -> None:
        super().__init__(
            f"{where} holds values that are not finite.",
            received=f"{nan} NaN and {infinite} infinite of {elements} elements",
            expected="finite values",
            fix="run the same prompt in fp32; if all is finite there, keep the layer before this one in high precision",
        )
        self.nan = nan
        self.infinite = infinite
        self.elements = elements

    def located(self, stage: str, layer: str, step: int | None = None) -> NonFiniteError:
        """Return the same error with its place: ``raise error.located("dit", "double.3.image.fc2", 7) from error``."""
        at_step = "" if step is None else f" at step {step}"
        return NonFiniteError(
            self.nan, self.infinite, self.elements, f"the input of layer {layer!r} of stage {stage!r}{at_step}"
        )
