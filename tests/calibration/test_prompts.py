"""Prompt files: what is read, what is refused and where, and which prompts are kept back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.calibration.errors import CalibrationError
from reelforge.calibration.prompts import DEFAULT_PROMPTS, prompts_sha256, read_prompts, split_prompts


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    return path


def test_one_prompt_per_line(tmp_path: Path) -> None:
    text = "# a comment\n\n  a cat # not a comment \r\n\tein Bär\n   \n#\n猫\n".encode()
    expected = ("a cat # not a comment", "ein Bär", "猫")
    assert read_prompts(write(tmp_path, text)) == expected
    assert read_prompts(write(tmp_path, b"\xef\xbb\xbf" + text)) == expected  # with a byte order mark
    assert read_prompts(write(tmp_path, "one\x0bstill one\u2028and here".encode())) == (
        "one\x0bstill one\u2028and here",
    )


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# only\n  # comments\n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    with pytest.raises(CalibrationError, match="are empty") as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert f"received: {len(content)} bytes without a prompt" in str(caught.value)
    assert "leave the option out" in str(caught.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_other_encodings_are_refused_with_their_place(tmp_path: Path, mark: bytes) -> None:
    content = mark + b"a cat\na dog\nein B\xe4r\n"
    path = write(tmp_path, content)
    with pytest.raises(CalibrationError, match="are not UTF-8 in line 3") as caught:
        read_prompts(path)
    assert f"received: byte 0xe4 at offset {content.index(0xE4)}" in str(caught.value)
    assert "save the file as UTF-8" in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(CalibrationError, match="cannot be read: ") as caught:
            read_prompts(path)
        assert str(path) in str(caught.value)


def test_the_built_in_prompts() -> None:
    assert len(set(DEFAULT_PROMPTS)) == len(DEFAULT_PROMPTS) == 16
    assert [len(part) for part in split_prompts(DEFAULT_PROMPTS)] == [12, 4]


@given(st.lists(st.text(max_size=5), max_size=40))
def test_a_quarter_is_kept_back(prompts: list[str]) -> None:
    used, kept = split_prompts(prompts)
    if len(prompts) < 2:
        assert used == kept == tuple(prompts)
        return
    assert used + kept == tuple(prompts)
    assert used
    assert len(kept) == max(1, len(prompts) // 4)


def test_the_digest_depends_on_every_prompt_and_their_order() -> None:
    several = (["a", "b"], ["b", "a"], ["ab"], ["a b"], ["a", "b", ""], ["a\nb"], [])
    assert len({prompts_sha256(prompts) for prompts in several}) == len(several)
    assert prompts_sha256(["ü"]) == prompts_sha256(("ü",))
