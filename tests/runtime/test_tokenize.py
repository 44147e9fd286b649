"""Prompts to ids: exact lengths, truncation with a notice, and text that is no text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelforge.runtime import tokenize
from reelforge.runtime.errors import BundleError, RequestError
from reelforge.runtime.manifest import PromptTemplate
from reelforge.runtime.tokenize import clean_prompt, clip_tokens, llm_tokens
from tests.runtime.fake_bundle import SPEC, TEMPLATE, byte_tokenizer

BEGIN, END = 256, 257


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_tokenizer("<s>", None).save(str(folder / "llm.json"))
    byte_tokenizer("<a>", "<z>").save(str(folder / "clip.json"))
    return folder / "llm.json", folder / "clip.json"


def ids_of(path: Path, text: str) -> list[int]:
    """The same file read by the tokenizers library itself, without its special tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_llm_prompt_stands_in_the_template(tokenizers: tuple[Path, Path]) -> None:
    tokens = llm_tokens("  a {ball}\n", tokenizers[0], TEMPLATE, SPEC.llm)
    assert tokens.ids.dtype.name == "int64"
    assert tokens.ids.tolist() == [[BEGIN, *ids_of(tokenizers[0], "Tell: a {ball}.")]]
    assert tokens.notice is None


def test_empty_prompt(tokenizers: tuple[Path, Path]) -> None:
    for prompt in ("", " \n\t"):
        assert llm_tokens(prompt, tokenizers[0], TEMPLATE, SPEC.llm).ids.shape == (1, TEMPLATE.crop_start + 1)
        assert clip_tokens(prompt, tokenizers[1], SPEC.clip).ids.tolist() == [[BEGIN, END]]


@pytest.mark.parametrize(("letters", "kept", "notice"), [(19, 20, False), (20, 20, True), (30, 20, True)])
def test_llm_truncation_on_the_right(tokenizers: tuple[Path, Path], letters: int, kept: int, notice: bool) -> None:
    prompt = "abcdefghij" * (letters // 10) + "x" * (letters % 10)
    tokens = llm_tokens(prompt, tokenizers[0], TEMPLATE, SPEC.llm)
    whole = [BEGIN, *ids_of(tokenizers[0], f"Tell: {prompt}.")]
    assert tokens.ids.tolist() == [whole[: TEMPLATE.crop_start + kept]]
    assert (tokens.notice is not None) is notice
    if tokens.notice:
        assert f"the prompt has {letters + 1} tokens" in tokens.notice
        assert "the first 20 are used" in tokens.notice


def test_ten_thousand_words(tokenizers: tuple[Path, Path]) -> None:
    prompt = "word " * 10_000
    assert llm_tokens(prompt, tokenizers[0], TEMPLATE, SPEC.llm).ids.shape == (1, TEMPLATE.crop_start + 20)
    tokens = clip_tokens(prompt, tokenizers[1], SPEC.clip)
    assert tokens.ids.shape == (1, 12)
    assert tokens.notice is not None
    assert "CLIP" in tokens.notice


def test_clip_truncation_keeps_the_end_token(tokenizers: tuple[Path, Path]) -> None:
    exact = clip_tokens("abcdefghij", tokenizers[1], SPEC.clip)
    assert exact.ids.tolist() == [[BEGIN, *ids_of(tokenizers[1], "abcdefghij"), END]]
    assert exact.notice is None
    longer = clip_tokens("abcdefghijk", tokenizers[1], SPEC.clip)
    assert longer.ids.tolist() == exact.ids.tolist()
    assert longer.notice is not None


def test_clip_is_cut_after_the_first_end_token(tokenizers: tuple[Path, Path]) -> None:
    tokens = clip_tokens("ab<z>cd", tokenizers[1], SPEC.clip)
    assert tokens.ids.tolist() == [[BEGIN, *ids_of(tokenizers[1], "ab"), END]]
    assert tokens.notice is None


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_lengths_hold_for_any_text(tokenizers: tuple[Path, Path], prompt: str) -> None:
    words = llm_tokens(prompt, tokenizers[0], TEMPLATE, SPEC.llm).ids[0]
    assert TEMPLATE.crop_start < len(words) <= TEMPLATE.crop_start + SPEC.llm.max_text_tokens
    pooled = clip_tokens(prompt, tokenizers[1], SPEC.clip).ids[0].tolist()
    assert len(pooled) <= SPEC.clip.max_tokens
    assert pooled.index(END) == len(pooled) - 1


@pytest.mark.parametrize("prompt", ["", "short", "a longer prompt than fits", "ab<z>cd and more"])
def test_equals_the_references_calls_of_transformers(tokenizers: tuple[Path, Path], prompt: str) -> None:
    from transformers import PreTrainedTokenizerFast

    def reference(path: Path, text: str, length: int) -> list[int]:
        # As both reference pipelines call it: padded to the length, truncated, and the mask says what is valid.
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="!")
        batch = tokenizer(text, max_length=length, padding="max_length", truncation=True)
        return [token for token, valid in zip(batch["input_ids"], batch["attention_mask"], strict=True) if valid]

    text = TEMPLATE.text.format(prompt)
    expected = reference(tokenizers[0], text, TEMPLATE.crop_start + SPEC.llm.max_text_tokens)
    assert llm_tokens(prompt, tokenizers[0], TEMPLATE, SPEC.llm).ids[0].tolist() == expected
    valid = reference(tokenizers[1], prompt, SPEC.clip.max_tokens)
    # The pooled state is the one at the first end token; what comes later cannot be seen from there.
    assert clip_tokens(prompt, tokenizers[1], SPEC.clip).ids[0].tolist() == valid[: valid.index(END) + 1]


@pytest.mark.parametrize("prompt", ["a \ud800 b", b"caf\xe9".decode("utf-8", "surrogateescape")])
def test_text_that_is_not_unicode(prompt: str) -> None:
    with pytest.raises(RequestError, match="not valid Unicode text at character") as caught:
        clean_prompt(prompt)
    assert "--prompt-file" in str(caught.value)
    str(caught.value).encode()  # the message itself must be printable


@pytest.mark.parametrize("text", ["no slot", "{} and {}"])
def test_a_template_without_one_slot(tokenizers: tuple[Path, Path], text: str) -> None:
    with pytest.raises(BundleError, match="no place for the prompt"):
        llm_tokens("x", tokenizers[0], PromptTemplate(text, 1, "test"), SPEC.llm)


def test_a_template_shorter_than_its_crop(tokenizers: tuple[Path, Path]) -> None:
    with pytest.raises(BundleError, match="shorter than the part of it that is cropped"):
        llm_tokens("", tokenizers[0], replace(TEMPLATE, crop_start=30), SPEC.llm)


def test_tokenizers_of_another_model(tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="end-of-text token"):
        clip_tokens("x", tokenizers[0], SPEC.clip)
    with pytest.raises(BundleError, match="does not belong to the bundle's model"):
        llm_tokens("x", tokenizers[0], TEMPLATE, replace(SPEC.llm, vocabulary=100))
    with pytest.raises(BundleError, match="does not belong to the bundle's model"):
        clip_tokens("x", tokenizers[1], replace(SPEC.clip, vocabulary=100))
    (tmp_path / "llm.json").write_text("{}")
    with pytest.raises(BundleError, match="is not a tokenizer"):
        llm_tokens("x", tmp_path / "llm.json", TEMPLATE, SPEC.llm)


def test_a_tokenizer_is_loaded_once_and_again_when_its_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "llm.json"
    byte_tokenizer("<s>", None).save(str(path))
    first = tokenize._load(path)
    assert tokenize._load(path) is first
    byte_tokenizer("<other>", None).save(str(path))
    assert tokenize._load(path) is not first
    path.unlink()
    with pytest.raises(BundleError, match="is not a tokenizer"):
        tokenize._load(path)
