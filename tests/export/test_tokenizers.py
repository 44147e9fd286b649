"""Tokenizer files: the same ids as transformers gives, the same bytes each time, and errors that say what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from reelforge.export.tokenizers import Role, tokenizer_json
from reelforge.runtime.errors import CheckpointError
from reelforge.tools.synthesize import synthesize

PROMPTS = ("", "a red circle moving right", "  Ünïcode, 12345 and\n\nlines ", "cat " * 100)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("tokenizers") / "tiny", "tiny")


@pytest.mark.parametrize(("folder", "role"), [("tokenizer", "llm"), ("tokenizer_2", "clip")])
def test_ids_equal_those_of_transformers(checkpoint: Path, folder: str, role: Role) -> None:
    ours = Tokenizer.from_str(tokenizer_json(checkpoint / folder, role).decode())
    theirs = AutoTokenizer.from_pretrained(checkpoint / folder, local_files_only=True)
    for prompt in PROMPTS:
        assert ours.encode(prompt).ids == theirs(prompt).input_ids


def test_clip_wraps_and_llm_begins(checkpoint: Path) -> None:
    llm = Tokenizer.from_str(tokenizer_json(checkpoint / "tokenizer", "llm").decode())
    assert llm.encode("").tokens == ["<|begin_of_text|>"]
    clip = Tokenizer.from_str(tokenizer_json(checkpoint / "tokenizer_2", "clip").decode())
    assert clip.encode("A CAT").tokens == ["<|startoftext|>", "a</w>", "cat</w>", "<|endoftext|>"]


@pytest.mark.parametrize(("folder", "role"), [("tokenizer", "llm"), ("tokenizer_2", "clip")])
def test_bytes_do_not_depend_on_how_the_file_was_saved(
    checkpoint: Path, tmp_path: Path, folder: str, role: Role
) -> None:
    expected = tokenizer_json(checkpoint / folder, role)
    assert tokenizer_json(checkpoint / folder, role) == expected
    # Saved again by the library, with somebody's padding and truncation.
    again = Tokenizer.from_str(expected.decode())
    again.enable_padding(length=77)
    again.enable_truncation(77)
    again.save(str(tmp_path / "tokenizer.json"), pretty=True)
    assert tokenizer_json(tmp_path, role) == expected


def edited(checkpoint: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    target.mkdir()
    content = json.loads((checkpoint / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def test_no_tokenizer(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer") as caught:
        tokenizer_json(tmp_path / "nowhere", "llm")
    assert "no such folder" in str(caught.value)
    shutil.copy(checkpoint / "tokenizer_2" / "vocab.json", tmp_path)
    with pytest.raises(CheckpointError, match="holds no tokenizer") as caught:
        tokenizer_json(tmp_path, "clip")
    assert "vocab.json" in str(caught.value)
    assert "merges.txt" in str(caught.value)


def test_damaged_files(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = (checkpoint / "tokenizer" / "tokenizer.json").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizer_json(tmp_path, "llm")
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizer_json(tmp_path, "llm")
    path.write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        tokenizer_json(tmp_path, "llm")
    path.write_text('{"model": {"type": "none"}}')
    with pytest.raises(CheckpointError, match="not a file of the tokenizers library"):
        tokenizer_json(tmp_path, "llm")


def test_damaged_slow_files(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint / "tokenizer_2", tmp_path / "a")
    (tmp_path / "a" / "vocab.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizer_json(tmp_path / "a", "clip")
    shutil.copytree(checkpoint / "tokenizer_2", tmp_path / "b")
    (tmp_path / "b" / "merges.txt").write_text("#version: 0.2\nq zz\n")
    with pytest.raises(CheckpointError, match="cannot be converted"):
        tokenizer_json(tmp_path / "b", "clip")


def test_missing_special_tokens(tmp_path: Path, checkpoint: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        for token in content["added_tokens"]:
            if token["content"] == "<|eot_id|>":
                token["content"] = "<|other|>"

    folder = edited(checkpoint, tmp_path / "x", rename)
    with pytest.raises(CheckpointError, match="lacks special tokens") as caught:
        tokenizer_json(folder, "llm")
    assert "<|eot_id|>" in str(caught.value)
    with pytest.raises(CheckpointError, match="lacks special tokens") as caught:
        tokenizer_json(checkpoint / "tokenizer", "clip")
    assert "<|startoftext|>" in str(caught.value)


def test_a_special_token_that_falls_apart(tmp_path: Path, checkpoint: Path) -> None:
    def demote(content: dict[str, Any]) -> None:
        token = next(token for token in content["added_tokens"] if token["content"] == "<|eot_id|>")
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 505]
        content["model"]["vocab"]["<|eot_id|>"] = token["id"]
        for other in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"):
            content["added_tokens"].append(
                {
                    "id": 510,
                    "content": other,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            )

    folder = edited(checkpoint, tmp_path / "x", demote)
    with pytest.raises(CheckpointError, match=r"does not keep '<\|eot_id\|>' in one piece"):
        tokenizer_json(folder, "llm")


def test_a_tokenizer_that_does_not_begin(tmp_path: Path, checkpoint: Path) -> None:
    folder = edited(checkpoint, tmp_path / "x", lambda content: content.update(post_processor=None))
    with pytest.raises(CheckpointError, match=r"does not add <\|begin_of_text\|>"):
        tokenizer_json(folder, "llm")
