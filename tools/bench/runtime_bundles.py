"""The models of the runtime's benchmark: checkpoints and the bundles that ``build-engine`` makes of them.

Bundles follow diffusers' numerics where they are compared with it: the same tiles of the VAE, the same guidance value.
What is there already is not built again: remove the folder after changing the compiler. The module does not know what
is measured.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.tokenize import llm_tokens
from reelforge.tools.bench.runtime_child import Task
from reelforge.tools.synthesize import synthesize
from reelforge.tools.synthesize_files import Content

EIGHT_BIT = "int8-decoder"
"""INT8 with the decoder, too, beside ``int8`` as the command line means it."""

MID_CALIBRATION_STEPS = 2
MID_CALIBRATION_PROMPTS = ("a red circle moving right on a black background", "a blue square")

_WORDS = {EIGHT_BIT: "dit=int8,vae_decoder=int8"}


@dataclass(frozen=True)
class Models:
    """Where checkpoints and bundles are.

    Attributes:
        checkpoint: The demonstration model's.
        folder: For what is made.
    """

    checkpoint: Path
    folder: Path

    def build_all(self) -> None:
        """Build whatever is missing."""
        for precision in ("fp32", "int8", EIGHT_BIT):
            self.demo(precision)
            self.mid(precision)
        self.demo("fp32", numerics="tencent")
        self.wide_vae()
        self.wide_vae(EIGHT_BIT)

    def demo(self, precision: str, numerics: str = "diffusers") -> Path:
        """Return the bundle of the demonstration model, calibrated as ``make demo`` does for int8."""
        prompts = self.checkpoint.parent / "calibration_prompts.txt"
        return self._bundle("demo", self.checkpoint, precision, prompts, ["--smoothing", "0.5"], numerics)

    def mid_checkpoint(self) -> Path:
        """Return the synthetic checkpoint of 0.3 billion parameters."""
        return self._checkpoint("mid", None)

    def mid(self, precision: str) -> Path:
        """Return its bundle; int8 is calibrated on few steps, since random weights make no picture to spoil.

        Its attention is in int8, too: half of a step. The demonstration model's 57 tokens leave nothing to gain there.
        """
        prompts = self.folder / "mid-prompts.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        prompts.write_text("".join(f"{prompt}\n" for prompt in MID_CALIBRATION_PROMPTS), encoding="utf-8")
        options = ["--attention", "int8", "--calibration-steps", str(MID_CALIBRATION_STEPS), "--no-gate"]
        return self._bundle("mid", self.mid_checkpoint(), precision, prompts, options)

    def wide_vae(self, precision: str = "fp32") -> Path:
        """Return a bundle with the demonstration model's transformer and the published VAE's widths, invented weights.

        Its values are mostly zeros, which take as long and as much memory as others; scales are invented, too.
        """
        checkpoint = self._checkpoint("wide-vae", Content.SPARSE)
        options = [] if precision == "fp32" else ["--scales", str(self._invented(checkpoint)), "--no-gate"]
        return self._bundle("wide-vae", checkpoint, precision, None, options, numerics="tencent")

    def _invented(self, checkpoint: Path) -> Path:
        from reelforge.export.build_request import BuildRequest
        from reelforge.runtime.recipe import Backend, Precision, Target
        from reelforge.tools.bench.invented_scales import write_invented_scales

        precision = dict.fromkeys(("dit", "vae_decoder"), Precision.INT8)
        request = BuildRequest(checkpoint, self.folder, Target(Backend.CPU), precision)
        return write_invented_scales(request, self.folder / f"{checkpoint.stem}.safetensors")

    def _checkpoint(self, size: str, content: Content | None) -> Path:
        path = self.folder / f"{size}.checkpoint"
        return path if path.exists() else synthesize(path, size, content=content)

    def _bundle(
        self,
        name: str,
        checkpoint: Path,
        precision: str,
        prompts: Path | None,
        options: Sequence[str],
        numerics: str = "diffusers",
    ) -> Path:
        path = self.folder / f"{name}-{precision}-{numerics}.bundle"
        if path.exists():
            return path
        command = [sys.executable, "-m", "reelforge.tools.build_engine", str(checkpoint), "-o", str(path)]
        command += ["--precision", _WORDS.get(precision, precision), "--numerics", numerics]
        if precision != "fp32":
            command += [*([] if prompts is None else ["--calibration-prompts", str(prompts)]), *options]
        try:
            subprocess.run([*command, "--json"], check=True, stdout=subprocess.DEVNULL)
        except subprocess.CalledProcessError as error:
            raise click.ClickException(f"{' '.join(command)} failed with status {error.returncode}") from error
        click.echo(f"built {path}")
        return path


def task(bundle: Path, prompt: str, steps: int, size: tuple[int, int, int] | None = None, seed: int = 0) -> Task:
    """Return a video of a bundle's model.

    Args:
        bundle: Gives tokenizer, guidance and, if ``size`` is None, the size.
        prompt: Its text.
        steps: Sampling steps.
        size: Height, width, frames.
        seed: Of the noise.
    """
    opened = Bundle.open(bundle, Check.SIZES)
    manifest = opened.manifest
    defaults = manifest.spec.defaults
    words = llm_tokens(prompt, opened.tokenizer_path("llm"), manifest.prompt_template, manifest.spec.llm)
    tokens = words.ids.shape[1] - manifest.prompt_template.crop_start
    height, width, frames = size or (defaults.height, defaults.width, defaults.frames)
    return Task(prompt, tokens, height, width, frames, steps, defaults.guidance, seed)
