"""Whatever text goes in comes out of Google's own reader."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reelforge.tools.triton.text_format import Word, text_of
from tests.tools.triton.triton_schema import parse, schema

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS, st.integers(-(2**31), 2**31 - 1), st.lists(st.integers(-1, 2**40), min_size=1), st.booleans())
def test_values_survive(text: str, number: int, dims: list[int], flag: bool) -> None:
    tensor = {"name": text, "data_type": Word("TYPE_BF16"), "dims": dims, "optional": flag}
    config = parse(text_of({"name": text, "max_batch_size": number, "input": [tensor, tensor]}))
    assert (config.name, config.max_batch_size) == (text, number)
    assert len(config.input) == 2
    assert (config.input[1].name, list(config.input[1].dims), config.input[1].optional) == (text, dims, flag)
    assert config.input[1].data_type == schema().TYPE_BF16


@given(st.dictionaries(TEXTS, TEXTS))
def test_maps_survive(values: dict[str, str]) -> None:
    entries = [{"key": key, "value": {"string_value": value}} for key, value in values.items()]
    config = parse(text_of({"parameters": entries}))
    assert {key: value.string_value for key, value in config.parameters.items()} == values
