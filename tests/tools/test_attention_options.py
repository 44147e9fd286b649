"""Options of sparse attention: their text as data, and what the commands say."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import SparseAttention, SparseKind
from reelforge.tools.attention_options import sparse_attention_of
from reelforge.tools.build_engine import build_engine
from reelforge.tools.generate import generate
from tests.runtime.fake_bundle import write_fake_bundle


def test_what_a_build_says() -> None:
    assert sparse_attention_of(None, None) is None
    assert sparse_attention_of("lists", None) == SparseAttention(SparseKind.LISTS, 128, 64)
    assert sparse_attention_of("topk", " 16x4 ") == SparseAttention(SparseKind.TOP_K, 16, 4)


@pytest.mark.parametrize("text", ["", "128", "128x", "x64", "128x64x1", "-1x4", "1e3x4", "9999999x4"])
def test_blocks_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RequestError, match="cannot be read") as caught:
        sparse_attention_of("lists", text)
    assert caught.value.received == text
    assert caught.value.fix == "write for example 128x64"


def test_blocks_of_dense_attention() -> None:
    with pytest.raises(RequestError, match="leaves nothing out") as caught:
        sparse_attention_of(None, "4x4")
    assert caught.value.fix == "add --sparse-attention lists, or leave the blocks out"


def test_commands_list_the_choices() -> None:
    runner = CliRunner()
    shown = runner.invoke(build_engine, ["--help"]).output
    assert "--sparse-attention [lists|topk]" in shown
    assert "--attention-blocks QUERIESxKEYS" in shown
    shown = runner.invoke(generate, ["--help"]).output
    assert "--attention [dense|sliding-tile|radial|topk]" in shown
    assert "--dense-steps" in shown


@pytest.mark.parametrize(
    ("arguments", "message", "fix"),
    [
        (
            ["--attention", "radial"],
            "attention=radial is not supported by bundle",
            "rebuild with --sparse-attention lists",
        ),
        (["--attention", "topk"], "attention=topk is not supported by bundle", "rebuild with --sparse-attention topk"),
        (["--dense-steps", "3"], "nothing says what comes after", "add for example --attention radial"),
        (["--attention-table", "nothing.json"], "'nothing.json' cannot be read", "check the path"),
    ],
)
def test_a_dense_bundle_refuses(tmp_path: Path, arguments: list[str], message: str, fix: str) -> None:
    write_fake_bundle(tmp_path / "dense.bundle")
    command = [str(tmp_path / "dense.bundle"), "-p", "a ball", "-o", str(tmp_path / "x.mp4"), *arguments]
    result = CliRunner().invoke(generate, command)
    assert isinstance(result.exception, RequestError)
    assert message in result.exception.where
    assert fix in result.exception.fix
    assert not (tmp_path / "x.mp4").exists()
