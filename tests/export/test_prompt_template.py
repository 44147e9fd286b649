"""The prompt template: which source wins, what is verified, and every way in which one can be wrong."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from reelforge.export import prompt_template as module
from reelforge.export.prompt_template import VIDEO_TEMPLATE_SHA256, find_prompt_template
from reelforge.runtime.errors import CheckpointError
from reelforge.tools import synthesize_text as text
from reelforge.tools.synthesize_layout import SIZES

START = "<|start_header_id|>user<|end_header_id|>\n\n"
END = "<|eot_id|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(text.llm_tokenizer(SIZES["tiny"].llm).decode())


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    return Tokenizer.from_str(text.llm_tokenizer(SIZES["full"].llm).decode())


def written(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_the_users_file_wins_over_the_checkpoints(tmp_path: Path, tokenizer: Tokenizer) -> None:
    written(tmp_path / "prompt_template.json", {"template": f"{START}{{}}{END}", "crop_start": 5})
    override = written(tmp_path / "mine.txt", f"<|end_header_id|>{{}}{END}\n")
    found = find_prompt_template(tmp_path, override, tokenizer)
    assert (found.text, found.crop_start, found.source) == (f"<|end_header_id|>{{}}{END}", 2, "--prompt-template")
    found = find_prompt_template(tmp_path, None, tokenizer)
    assert (found.text, found.crop_start, found.source) == (f"{START}{{}}{END}", 5, "checkpoint")


def test_crop_start_is_counted_where_it_is_not_given(tmp_path: Path, tokenizer: Tokenizer) -> None:
    override = written(tmp_path / "t.json", {"template": f"{START}{{}}{END}"})
    found = find_prompt_template(None, override, tokenizer)
    # begin-of-text, header start, "user", header end, double line break
    assert tokenizer.encode(START).tokens == [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "user",
        "<|end_header_id|>",
        "ĊĊ",
    ]
    assert found.crop_start == 5


def test_diffusers_default_is_read_without_importing_it(llama: Tokenizer) -> None:
    found = find_prompt_template(None, None, llama)
    assert hashlib.sha256(found.text.encode()).hexdigest() == VIDEO_TEMPLATE_SHA256
    assert found.crop_start == 95
    assert found.source == f"diffusers {importlib.metadata.version('diffusers')}"
    code = (
        "import sys\n"
        "from reelforge.export.prompt_template import _from_diffusers\n"
        "assert _from_diffusers() is not None\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tokenizer_of_another_model_is_found_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    override = written(tmp_path / "t.json", {"template": f"{START}{{}}{END}", "crop_start": 95})
    with pytest.raises(CheckpointError, match="says crop_start=95, but the tokenizer disagrees") as caught:
        find_prompt_template(None, override, tokenizer)
    assert "5 tokens before the slot" in str(caught.value)


def install_fake_diffusers(folder: Path, source: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "diffusers"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    if source is not None:
        path = package / "pipelines" / "hunyuan_video" / "pipeline_hunyuan_video.py"
        path.parent.mkdir(parents=True)
        path.write_text(source)
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)  # other tests import the real one
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    "source",
    [
        "DEFAULT_PROMPT_TEMPLATE = {'template': 'another {}', 'crop_start': 95}\n",
        "DEFAULT_PROMPT_TEMPLATE = load()\n",
        "DEFAULT_PROMPT_TEMPLATE = 7\n",
        "x = 1\n",
    ],
)
def test_another_template_in_diffusers_is_refused(
    source: str, tmp_path: Path, llama: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_diffusers(tmp_path, source, monkeypatch)
    with pytest.raises(CheckpointError, match="is not the one HunyuanVideo was trained with") as caught:
        find_prompt_template(None, None, llama)
    assert "--prompt-template FILE" in str(caught.value)


def test_no_template_anywhere(tmp_path: Path, llama: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_diffusers(tmp_path, None, monkeypatch)
    with pytest.raises(CheckpointError, match="comes without a prompt template, and none is installed") as caught:
        find_prompt_template(tmp_path, None, llama)
    assert "--prompt-template FILE" in str(caught.value)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="comes without a prompt template"):
        find_prompt_template(tmp_path, None, llama)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no slot at all", "exactly one place for the prompt"),
        ("{} and {}", "exactly one place for the prompt"),
        ({"template": START}, "exactly one place for the prompt"),
        ({"text": "{}"}, "other fields than a template has"),
        ({"template": 5}, "other fields than a template has"),
        ({"template": f"{START}{{}}{END}", "crop_start": "5"}, "other fields than a template has"),
        ({"template": f"{START}{{}}{END}", "crop_start": True}, "other fields than a template has"),
        ({"template": f"{START}{{}}{END}", "crop_start": 5, "more": 1}, "other fields than a template has"),
        ({"template": f"{START}{{}}{END}", "crop_start": 4}, "the tokenizer disagrees"),
        ('{"template": ', "not valid JSON"),
        (f"{START}{{}}", "cannot be cropped"),  # an empty prompt would leave no token
        ("the{}b" + END, "cannot be cropped"),  # the prompt changes the word before it
    ],
)
def test_wrong_templates(content: object, message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_prompt_template(None, written(tmp_path / "template", content), tokenizer)


def test_unreadable_templates(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.txt"
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        find_prompt_template(None, path, tokenizer)
    assert "No such file" in str(caught.value)
    path.write_bytes(b"caf\xe9 {}")
    with pytest.raises(CheckpointError, match="not UTF-8") as caught:
        find_prompt_template(None, path, tokenizer)
    assert "0xe9 at offset 3" in str(caught.value)
