"""What tests of ``reelforge inspect --diff`` share: two bundles that differ in precision, and how they are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.manifest import ProfileEntry
from reelforge.runtime.quality import QualityReport, StageQuality
from reelforge.runtime.recipe import Precision, VideoShape
from reelforge.tools.inspect_diff import BundleDifference, compare_bundles
from reelforge.tools.main import cli
from tests.tools.plan_bundles import Part, Written, dit_layers, write_plan_bundle

NAMES = [f"double.{k}.image.{name}.weight" for k in (0, 1) for name in ("q", "k", "fc1")]
PROFILE = ProfileEntry("480x832x81", {"latent_frames": (21, 21, 21)}, 2_700_000_000)
QUALITY = QualityReport(
    ("a red ball", "rain"),
    7,
    VideoShape(32, 48, 5),
    4,
    {"dit": StageQuality(0.99, 0.995, 0.02, 0.01)},
    (0.999, 0.99),
    (0.1, 0.2),
    (34.5, None),
    (0.97, 0.98),
)


def weights_as(dtype: str) -> dict[str, tuple[str, bytes]]:
    return {name: (dtype, f"{dtype} {name}".encode()) for name in NAMES}


BF16 = Written(
    plans={
        "dit": {"sm89+sm120": [Part(dit_layers("BF16", "BF16"), b"bf16", 25 * 10**9, (PROFILE,), 470.0)]},
        "vae_decoder": {"sm89+sm120": [Part((), b"v", 290_000_000)]},
    },
    weights={"dit": weights_as("BF16")},
)
FP8 = replace(
    BF16,
    precision={"dit": Precision.FP8},
    plans={
        **BF16.plans,
        "dit": {"sm89+sm120": [Part(dit_layers("FP8", "FP8"), b"fp8", 12 * 10**9, (PROFILE,), 286.0)]},
    },
    weights={"dit": weights_as("F8_E4M3")},
    quality=QUALITY,
)


def write(tmp_path: Path, name: str, what: Written) -> Path:
    write_plan_bundle(tmp_path / name, what)
    return tmp_path / name


def compare(tmp_path: Path, first: Written, second: Written) -> BundleDifference:
    paths = [write(tmp_path, name, what) for name, what in (("first", first), ("second", second))]
    return compare_bundles(*(Bundle.open(path) for path in paths))


def shown(first: Path, second: Path, *options: str) -> str:
    result = CliRunner().invoke(cli, ["inspect", str(first), "--diff", str(second), *options], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.output


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def stage(found: BundleDifference, name: str) -> Any:
    return next(each for each in found.stages if each.name == name)


def plan(found: BundleDifference, name: str) -> Any:
    [each] = [each for each in found.plans if each.stage == name]
    return each
