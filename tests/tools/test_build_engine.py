"""``build-engine`` as a user runs it: what it prints, its exit codes, and that the same inputs give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reelforge.runtime.bundle.open import Bundle
from reelforge.tools import console
from reelforge.tools.build_engine import build_engine
from tests.bundles import ALL_STAGES, TraceMemory

PARTED = ("--partition", "head,body,tail")


def run(*arguments: str | Path) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        console.run(build_engine, [os.fspath(argument) for argument in arguments])
    code = caught.value.code
    assert isinstance(code, int)
    return code


def digests(bundle: Path) -> dict[str, str]:
    files = (path for path in bundle.rglob("*") if path.is_file())
    return {path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Another process, other random hashes, every part traced anew: all files are equal, the manifest included."""
    command = [sys.executable, "-c", "from reelforge.tools.build_engine import main; main()"]
    result = subprocess.run(
        [*command, str(tiny_checkpoint), "-o", "b", "--numerics", "diffusers", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert digests(tmp_path / "b") == digests(tiny_bundle)
    value = json.loads(result.stdout)
    manifest = Bundle.open(tiny_bundle).manifest
    assert (value["bundle"], value["content_digest"], value["target"]) == ("b", manifest.content_digest, "cpu")
    times = [stage.pop("finished_s") for stage in value["stages"].values()]
    assert 0 < times[0] <= times[-1] <= value["seconds"]
    assert times == sorted(times)
    assert value["stages"] == {
        stage.name: {
            "weights_bytes": sum(weight.length for weight in stage.weights),
            "weights_of": "dit" if stage.name == "input_change" else None,
            "nodes": stage.nodes,
            "parity": None,
            "tolerance": 2e-5,
        }
        for stage in manifest.stages
    }


def test_what_a_person_sees(
    tiny_checkpoint: Path,
    tmp_path: Path,
    trace_memory: TraceMemory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with trace_memory.used():
        assert run(tiny_checkpoint, "-o", tmp_path / "b", "--stages", "clip, modulation", "--shapes", "64x96x5") == 0
    out, errors = capsys.readouterr()
    assert out == ""
    for part in ("clip", "modulation", "kB weights", "nodes by type", "operator", "Gemm", "built in", "content "):
        assert part in errors
    manifest = Bundle.open(tmp_path / "b").manifest
    assert [stage.name for stage in manifest.stages] == ["clip", "modulation"]
    assert [str(shape) for shape in manifest.recipe.shapes] == ["64x96x5"]
    assert manifest.content_digest[:16] in errors


def test_options_reach_the_bundle(
    tiny_checkpoint: Path, tmp_path: Path, trace_memory: TraceMemory, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("{}<|eot_id|>")
    options = ["--stages", "modulation", "--batch", "1", "--verify", "--json", "--prompt-template", tmp_path / "t.txt"]
    with trace_memory.used():
        assert run(tiny_checkpoint, "-o", tmp_path / "b", *options) == 0
    value = json.loads(capsys.readouterr().out)
    manifest = Bundle.open(tmp_path / "b").manifest
    assert value["stages"]["modulation"]["parity"] == manifest.stages[0].parity
    assert manifest.stages[0].parity is not None
    assert (manifest.prompt_template.text, manifest.prompt_template.crop_start) == ("{}<|eot_id|>", 1)
    assert manifest.provenance["numerics"] == "tencent"


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["{c}", "-o", "{o}", "--stages", "vae"], 2, ["has no such stages", "received: vae", ", ".join(ALL_STAGES)]),
        (["{c}", "-o", "{o}", "--target", "gpu"], 2, ["the target 'gpu' is not known", "fix: use --target cpu"]),
        (["{c}", "-o", "{o}", "--target", "cpu:sm90"], 2, ["the target 'cpu:sm90' is not known"]),
        (["{c}", "-o", "{o}", "--shapes", "big"], 2, ["the shape 'big' cannot be read", "720x1280x129"]),
        (["{c}", "-o", "{o}", "--shapes", "0x16x1"], 2, ["the shape '0x16x1' cannot be read"]),
        (
            ["{c}", "-o", "{o}", "--shapes", "720x1280x129,700x1280x129"],
            2,
            ["no videos of the shape 700x1280x129", "multiples of 16, frames 4k+1", "fix: use 704x1280x129"],
        ),
        (["{c}", "-o", "{o}", "--shapes", "64x100x6"], 2, ["no videos of the shape 64x100x6", "fix: use 64x112x9"]),
        (["{c}", "-o", "{o}", "--shapes", "16x16x4"], 2, ["no videos of the shape 16x16x4", "fix: use 16x16x5"]),
        (
            ["{c}", "-o", "{o}", "--precision", "fp9"],
            2,
            ["the precision 'fp9' cannot be read", "fix: write for example"],
        ),
        (["{c}", "-o", "{o}", "--precision", "int8", "--keep", "fc1"], 2, ["--keep 'fc1'", "STAGE=PATTERN"]),
        (["{c}", "-o", "{o}", "--keep", "dit=*"], 2, ["stages that are not in 8 bits", "received: dit=*"]),
        (["{c}", "-o", "{o}", "--recipe", "{c}/nothing"], 2, ["the recipe", "cannot be read", "fix: check the path"]),
        (
            ["{c}", "-o", "{o}", "--recipe", "rtx-4090-720", "--keep", "dit=*"],
            2,
            ["the recipe 'rtx-4090-720' cannot be read", "fix: use rtx-4090-720p, or check the path"],
        ),
        (["{c}", "-o", "{o}", "--precision", "int8", "--scales", "{c}/no"], 5, ["the scale file", "cannot be read"]),
        (
            ["{c}", "-o", "{o}", "--precision", "int8", "--scales", "{c}/no", "--smoothing", "0.5"],
            2,
            ["smoothing is asked for together with a scale file", "fix: leave --smoothing out"],
        ),
        (
            ["{c}", "-o", "{o}", "--precision", "int8", *PARTED, "--stages", "dit_head,dit_tail,head_change"],
            2,
            [
                "stages are parts of 'dit', whose layers are to be in 8 bits, and 'dit' is not built",
                "received: --stages dit_head,dit_tail,head_change with dit=int8",
                "expected: dit beside dit_head: they share its 8-bit weights",
                "fix: add dit to --stages, or build without 8 bits",
            ],
        ),
        (
            ["{c}", "-o", "{o}", "--precision", "dit=int8,llm=fp16", *PARTED, "--stages", "dit_body"],
            2,
            ["stages are parts of 'dit'", "--stages dit_body with dit=int8"],
        ),
        (
            ["{c}", "-o", "{o}", "--precision", "int8,vae_decoder=fp16", "--stages", "llm,vae_decoder"],
            2,
            [
                "8 bits are asked for, and no stage that is built would have any",
                "received: --stages llm,vae_decoder with --precision int8",
                "expected: dit among them: an 8-bit precision without a stage means its layers",
                "fix: add dit to --stages, or say which of them, as in --precision llm=int8",
            ],
        ),
        (["{c}", "-o", "{o}", "--batch", "0"], 2, ["--batch"]),
        (["{c}"], 2, ["Missing option", "--output"]),
        (["{c}/nothing", "-o", "{o}"], 2, ["is not a folder", "fix: download the model first"]),
        (["{c}/model_index.json", "-o", "{o}"], 2, ["is not a folder"]),
        (["{c}/vae", "-o", "{o}"], 3, ["holds no checkpoint that is known", "fix: give the checkpoint's root folder"]),
        (["{c}", "-o", "{o}", "--prompt-template", "{c}/vae"], 3, ["cannot be read", "Is a directory"]),
        (["{c}", "-o", "{c}"], 5, ["the output folder", "exists", "fix: remove it"]),
    ],
)
def test_refusals(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    parts: list[str],
) -> None:
    before = digests(tiny_checkpoint)
    places = {"c": str(tiny_checkpoint), "o": str(tmp_path / "b")}
    assert run(*(argument.format(**places) for argument in arguments)) == code
    out, errors = capsys.readouterr()
    assert out == ""
    for part in parts:
        assert part in errors, errors
    assert list(tmp_path.iterdir()) == []
    assert digests(tiny_checkpoint) == before


def test_help_reads_like_a_manual(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    page = capsys.readouterr().out
    for part in (
        "CHECKPOINT",
        "--precision",
        "--calibration-prompts",
        "--min-psnr",
        "--shapes",
        "--stages",
        "Examples:",
        "Exit codes:",
        "130",
    ):
        assert part in page
    assert "\b" not in page


def test_a_quantised_build_says_what_it_costs(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], remembered_traces: None
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball\na green leaf\n")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"precision": {"dit": "int8"}, "kept": {"dit": ["single.0.fc1"]}, "quality": {}}))
    options = ["--calibration-prompts", prompts, "--calibration-steps", "2", "--calibration-shape", "32x48x1"]
    assert run(tiny_checkpoint, "-o", tmp_path / "b", "--recipe", recipe, *options, "--min-psnr", "0") == 0
    shown = capsys.readouterr().err
    for part in ("1 held-out prompt of 32x48x1, 2 steps", "video PSNR", "velocity cosine", "built in"):
        assert part in shown, shown
    assert run(tiny_checkpoint, "-o", tmp_path / "c", "--recipe", recipe, *options, "--min-psnr", "0", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["recipe"]["kept"] == {"dit": ["single.0.fc1"]}
    assert set(value["quality"]["stages"]) == {"dit"}
    assert value["stages"]["dit"]["tolerance"] is None
    assert run(tiny_checkpoint, "-o", tmp_path / "d", "--recipe", recipe, *options, "--min-psnr", "300") == 6
    errors = capsys.readouterr().err
    for part in ("further from its reference", "at least 300 dB", "the worst layers are dit."):
        assert part in errors, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c", "prompts.txt", "recipe.json"]
