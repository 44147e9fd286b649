"""``reelforge sensitivity`` as a user runs it."""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.calibration.fingerprint import bundle_fingerprint
from reelforge.calibration.number_formats import INT8
from reelforge.calibration.scale_file import ScaleKind, tensor_name, write_scale_file
from reelforge.export.sensitivity import SensitivityRow, SensitivityTable
from reelforge.runtime.codec import from_json
from reelforge.runtime.pipeline import Pipeline
from reelforge.runtime.quality import QualityReport
from reelforge.runtime.recipe import Precision, QuantisationRecipe, VideoShape
from reelforge.tools import console, sensitivity, sensitivity_chart
from reelforge.tools.main import cli
from reelforge.tools.sensitivity_chart import draw_chart
from tests.variants import PROVENANCE, SHAPE, input_maxima

LAYERS = ("double.0.image.q", "double.0.image.fc1", "double.1.text.v", "single.1.proj_mlp")
SABOTAGED = "double.1.text.v"
SMALL = ("--shape", str(SHAPE), "--steps", "2", "--prompt-count", "1", "--steps-sampled", "2")


def run(*arguments: str | Path) -> int:
    """Run ``reelforge sensitivity`` in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        console.run(cli, ["sensitivity", *(os.fspath(argument) for argument in arguments)])
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def scales(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scales of all layers, one of them 50 times too large."""
    pipeline = Pipeline.open(tiny_bundle)
    maxima = input_maxima(pipeline, INT8)
    tensors = {}
    for name, maximum in maxima.items():
        largest = maximum * (50 if name == SABOTAGED else 1)
        tensors[tensor_name("dit", name, ScaleKind.ACTIVATION)] = np.array(largest / 127, np.float32)
        tensors[tensor_name("dit", name, ScaleKind.RANGE)] = np.array([-largest, largest], np.float32)
    path = tmp_path_factory.mktemp("scales") / "scales.safetensors"
    checkpoint = bundle_fingerprint(pipeline.bundle)
    write_scale_file(path, replace(PROVENANCE, checkpoint=checkpoint, format="dit=int8"), tensors)
    return path


@pytest.fixture
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the family quantise four layers only, so that there is little to measure."""
    from reelforge.export import variants

    monkeypatch.setattr(variants, "formats_of", lambda pipeline, stage, form: dict.fromkeys(LAYERS, form))


def test_table_chart_and_recipe(
    tiny_bundle: Path,
    scales: Path,
    tmp_path: Path,
    few_layers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball\n")
    table, chart, recipe = (tmp_path / name for name in ("table.json", "chart.png", "recipe.json"))
    files = ("-o", table, "--chart", chart, "--recipe", recipe, "--prompts", tmp_path / "prompts.txt")
    budget = ("--cosine-budget", "0.9995")
    assert run(tiny_bundle, "--scales", scales, "--precision", "dit=int8", *SMALL, *files, *budget) == 0
    out = capsys.readouterr().out

    content = json.loads(table.read_text())
    measured = from_json(SensitivityTable, content["table"])
    assert [row.name for row in measured.layers] == list(LAYERS)
    assert measured.prompts == ("a red ball",)
    assert (measured.steps, measured.shape) == (2, SHAPE)
    assert max(measured.layers, key=lambda row: row.relative_error).name == SABOTAGED
    assert content["choice"]["kept"] == [SABOTAGED]

    quality = from_json(QualityReport, content["quality"])
    assert quality.velocity_cosine_worst >= 0.9995
    written = json.loads(recipe.read_text())
    assert from_json(QualityReport, written.pop("quality")) == quality
    assert from_json(QuantisationRecipe, written) == QuantisationRecipe({"dit": Precision.INT8}, {"dit": (SABOTAGED,)})

    width, height = png_size(chart)
    assert width > 500
    assert height > 200
    lines = out.splitlines()
    first = next(line for line in lines if "double." in line)
    assert SABOTAGED in first
    for part in (
        "layers of dit, each alone in int8: worst first",
        "final latents",
        "kept in high precision: 1 of 4 layers, 16.4 kB",
        "smallest velocity cosine 0.999",
    ):
        assert part in out
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "table.json", "chart.png", "recipe.json"}


def test_the_quick_way(tiny_bundle: Path, scales: Path, few_layers: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Built-in prompts, no loop, nothing written; the precision for the model means its dit."""
    assert run(tiny_bundle, "--scales", scales, "--precision", "int8", "--no-loop", *SMALL) == 0
    out = capsys.readouterr().out
    assert SABOTAGED in out
    assert "final latents" not in out
    assert "kept" not in out


def test_a_budget_that_cannot_be_met(
    tiny_bundle: Path, scales: Path, tmp_path: Path, few_layers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.json"
    budget = ("--cosine-budget", "1.5", "--recipe", recipe, "--no-loop")
    assert run(tiny_bundle, "--scales", scales, "--precision", "int8", *SMALL, *budget) == 6
    errors = capsys.readouterr().err
    for part in ("the quality budget cannot be met", "received: 1 with all 4 layers kept", "expected: at least 1.5"):
        assert part in errors
    assert not recipe.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("--precision", "int4"), 2, ("the precision 'int4' cannot be read",)),
        (("--precision", "fp16"), 2, ("tries one stage in 8 bits", "received: --precision fp16", "dit=int8")),
        (("--precision", "dit=int8,llm=int8"), 2, ("one stage in 8 bits at a time", "--stage llm")),
        (("--precision", "dit=int8", "--stage", "llm"), 2, ("received: --precision dit=int8 --stage llm",)),
        (("--precision", "clip=int8"), 2, ("the stage 'clip' cannot be computed in 8 bits", "dit or llm")),
        (("--precision", "fp8"), 5, ("made for another number format", "dit=int8", "dit=float8_e4m3fn")),
        (("--precision", "int8", "--recipe", "r.json"), 2, ("--recipe needs a budget", "--quality-budget 40")),
        (("--precision", "int8", "--quality-budget", "40", "--cosine-budget", "1"), 2, ("two budgets are given",)),
        (
            ("--precision", "vae_decoder=int8", "--cosine-budget", "0.9"),
            2,
            ("no velocity depends on the stage 'vae_decoder'", "--quality-budget"),
        ),
        (("--precision", "int8", "--chart", "chart.pdf"), 7, ("cannot be written to 'chart.pdf'", "ends in .png")),
        (("--precision", "int8", "-o", "no/such/folder/t.json"), 7, ("in a folder that exists", "another path")),
        (("--precision", "int8", "--shape", "big"), 2, ("the shape 'big' cannot be read",)),
        (("--precision", "int8", "--shape", "33x48x5"), 2, ("height=33 is not supported",)),
        (("--precision", "int8", "--prompts", "none.txt"), 5, ("'none.txt' cannot be read",)),
        (("--precision", "int8", "--steps-sampled", "0"), 2, ("steps-sampled",)),
    ],
)
def test_what_is_refused(
    tiny_bundle: Path,
    scales: Path,
    arguments: tuple[str, ...],
    code: int,
    parts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tiny_bundle, "--scales", scales, *arguments) == code
    errors = capsys.readouterr().err
    for part in parts:
        assert part in errors
    assert "Traceback" not in errors


def test_scales_of_another_checkpoint(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.safetensors"
    write_scale_file(path, PROVENANCE, {"dit.a.activation": np.array(1, np.float32)})
    assert run(tiny_bundle, "--scales", path, "--precision", "int8") == 5
    assert "was made for another checkpoint" in capsys.readouterr().err


def test_a_disk_that_refuses(
    tiny_bundle: Path,
    scales: Path,
    tmp_path: Path,
    few_layers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    output = tmp_path / "table.json"
    arguments = ("--precision", "int8", "--no-loop", *SMALL, "-o", output)
    assert run(tiny_bundle, "--scales", scales, *arguments) == 7
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_matplotlib(
    tiny_bundle: Path, scales: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sensitivity.importlib.util, "find_spec", lambda name: None)
    assert run(tiny_bundle, "--scales", scales, "--precision", "int8", "--chart", "chart.png") == 2
    errors = capsys.readouterr().err
    assert "matplotlib is not installed" in errors
    assert "pip install matplotlib" in errors


def row(name: str, block: str, error: float, latent: float | None) -> SensitivityRow:
    return SensitivityRow(name, block, (name,), "int8", 64, 1 - error**2 / 2, error, None, latent, None)


def made_table(layers: int, blocks: bool = True, latent: float | None = 0.01) -> SensitivityTable:
    rows = tuple(
        row(f"single.{index // 6}.layer_{index % 6}", f"single.{index // 6}", 0.001 * (index + 1), latent)
        for index in range(layers)
    )
    whole = tuple(row(name, name, 0.5, latent) for name in dict.fromkeys(item.block for item in rows))
    return SensitivityTable("dit", ("a",), 0, VideoShape(32, 32, 5), 2, (0, 1), rows, whole if blocks else ())


def test_a_chart_is_the_same_every_time_and_grows_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity_chart, "MAX_LAYERS", 12)
    sizes = []
    assert draw_chart(made_table(2)) == draw_chart(made_table(2))
    for count in (1, 6, 12, 36):
        data = draw_chart(made_table(count), ("single.0.layer_1",))
        path = tmp_path / f"{count}.png"
        path.write_bytes(data)
        sizes.append(png_size(path)[1])
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[3] == pytest.approx(sizes[2], rel=0.1)  # only the worst are drawn


@pytest.mark.parametrize("table", [made_table(4, blocks=False), made_table(4, latent=None)])
def test_a_chart_of_less(table: SensitivityTable, tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    path.write_bytes(draw_chart(table))
    assert png_size(path)[0] > 500


def png_size(path: Path) -> tuple[int, int]:
    """Return width and height of a PNG file whose every chunk is intact (https://www.w3.org/TR/png/)."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, kinds, size = 8, [], (0, 0)
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack(">I", data[position + 8 + length : position + 12 + length])
        assert zlib.crc32(kind + body) == checksum
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        kinds.append(kind)
        position += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    return size
