"""Expressions over stored tensors against plain NumPy and against the definition of rotary embedding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from reelforge.export.checkpoint.safetensors_file import read_safetensors
from reelforge.export.checkpoint.sources import (
    Columns,
    Conversion,
    HalfSplit,
    Rows,
    Source,
    SourceError,
    SwapHalves,
    Whole,
    loaded,
    resolve,
)
from reelforge.export.checkpoint.tensor_ref import TensorRef


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorRef]:
    path = tmp_path_factory.mktemp("sources") / "x.safetensors"
    shapes = {"matrix": (48, 40), "bias": (48,), "norm": (16,), "conv": (12, 4, 1, 2, 2), "scalar": (), "empty": (0, 4)}
    save_file({name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}, path)
    return read_safetensors(path)


def bits(refs: dict[str, TensorRef], name: str) -> np.ndarray:
    return loaded(refs[name]).view(np.uint16)


def result(refs: dict[str, TensorRef], source: Source, shape: tuple[int, ...], limit: int = 100) -> np.ndarray:
    resolved = resolve(source, refs, shape)
    assert resolved.dtype == "BF16"
    assert resolved.shape == shape
    data = b"".join(piece.tobytes() for piece in resolved.pieces(limit))
    assert len(data) == resolved.nbytes
    return np.frombuffer(data, np.uint16).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 48), st.integers(0, 48), st.integers(1, 5000))
def test_rows_are_a_slice_in_place(refs: dict[str, TensorRef], a: int, b: int, limit: int) -> None:
    start, stop = sorted((a, b))
    for name, shape in (("matrix", (stop - start, 40)), ("bias", (stop - start,))):
        assert isinstance(resolve(Rows(name, start, stop), refs, shape), TensorRef)
        assert np.array_equal(result(refs, Rows(name, start, stop), shape, limit), bits(refs, name)[start:stop])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 5000))
def test_columns_are_a_slice(refs: dict[str, TensorRef], a: int, b: int, limit: int) -> None:
    start, stop = sorted((a, b))
    source = Columns("matrix", start, stop)
    assert np.array_equal(result(refs, source, (48, stop - start), limit), bits(refs, "matrix")[:, start:stop])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 4, 8, 16, 24, 48]), st.integers(1, 5000))
def test_half_split_moves_even_rows_before_odd_ones(refs: dict[str, TensorRef], head_dim: int, limit: int) -> None:
    for name in ("matrix", "bias"):
        stored = bits(refs, name)
        heads = [stored[i : i + head_dim] for i in range(0, 48, head_dim)]
        expected = np.concatenate([part for head in heads for part in (head[0::2], head[1::2])])
        assert np.array_equal(result(refs, HalfSplit(Whole(name), head_dim), stored.shape, limit), expected)


def test_half_split_of_a_part_and_of_a_norm(refs: dict[str, TensorRef]) -> None:
    stored = bits(refs, "matrix")[16:32]
    got = result(refs, HalfSplit(Rows("matrix", 16, 32), 16), (16, 40))
    assert np.array_equal(got, np.concatenate([stored[0::2], stored[1::2]]))
    norm = bits(refs, "norm")
    assert np.array_equal(result(refs, HalfSplit(Whole("norm"), 16), (16,)), np.concatenate([norm[0::2], norm[1::2]]))


def test_swapped_halves(refs: dict[str, TensorRef]) -> None:
    for name in ("matrix", "bias"):
        stored = bits(refs, name)
        expected = np.concatenate([stored[24:], stored[:24]])
        assert np.array_equal(result(refs, SwapHalves(Whole(name)), stored.shape), expected)


def test_a_patch_convolution_is_a_matrix_in_place(refs: dict[str, TensorRef]) -> None:
    resolved = resolve(Whole("conv"), refs, (12, 16))
    assert isinstance(resolved, TensorRef)
    assert resolved.offset == refs["conv"].offset
    assert np.array_equal(result(refs, Whole("conv"), (12, 16)), bits(refs, "conv").reshape(12, 16))


def test_scalars_and_empty_tensors(refs: dict[str, TensorRef]) -> None:
    assert result(refs, Whole("scalar"), ()).shape == ()
    assert result(refs, Whole("empty"), (0, 4)).shape == (0, 4)
    empty = Conversion(refs["empty"], Columns("empty", 1, 3).select((0, 4)), "BF16", (0, 2))
    assert list(empty.pieces()) == []


@pytest.mark.parametrize(
    ("source", "shape", "message"),
    [
        (Whole("matrix"), (40, 48), r"gives \[48, 40\], \[40, 48\] is needed"),
        (Whole("matrix"), (1920,), "is needed"),
        (Whole("conv"), (48, 4), "is needed"),
        (Whole("scalar"), (1,), "is needed"),
        (Rows("matrix", 40, 49), (9, 40), "has 48 rows"),
        (Columns("matrix", 30, 41), (48, 11), "columns 30:41"),
        (Columns("bias", 0, 1), (48, 1), "of a matrix"),
        (HalfSplit(Whole("matrix"), 32), (48, 40), "whole heads of 32"),
        (HalfSplit(Whole("matrix"), 3), (48, 40), "whole heads of 3"),
        (SwapHalves(Rows("matrix", 0, 5)), (5, 40), "an even number"),
    ],
)
def test_refuses_tensors_that_do_not_fit(
    refs: dict[str, TensorRef], source: Source, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        resolve(source, refs, shape)


def interleaved_rotation(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * np.cos(angles) - x[..., 1::2] * np.sin(angles)
    out[..., 1::2] = x[..., 1::2] * np.cos(angles) + x[..., 0::2] * np.sin(angles)
    return out


def half_split_rotation(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    one, two = np.split(x, 2, axis=-1)
    return np.concatenate(
        [one * np.cos(angles) - two * np.sin(angles), two * np.cos(angles) + one * np.sin(angles)], axis=-1
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8, 16]), st.integers(1, 3))
def test_attention_scores_are_unchanged(
    tmp_path_factory: pytest.TempPathFactory, seed: int, head_dim: int, heads: int
) -> None:
    """Half-split rotation of reordered projections gives the scores of interleaved rotation (float64)."""
    rng = np.random.default_rng(seed)
    width = heads * head_dim
    weights = {name: rng.standard_normal((width, 6)) for name in ("q", "k")}
    weights |= {f"{name}_bias": rng.standard_normal(width) for name in ("q", "k")}
    weights |= {f"{name}_norm": rng.standard_normal(head_dim) for name in ("q", "k")}
    path = tmp_path_factory.mktemp("rope") / "x.safetensors"
    save_file({name: torch.from_numpy(value) for name, value in weights.items()}, path)
    refs = read_safetensors(path)
    reordered = {
        name: loaded(resolve(HalfSplit(Whole(name), head_dim), refs, value.shape)) for name, value in weights.items()
    }
    tokens = rng.standard_normal((5, 6))
    angles = rng.uniform(-10, 10, (5, 1, head_dim // 2))

    def scores(parts: dict[str, np.ndarray], rotation: object) -> np.ndarray:
        states = []
        for name in ("q", "k"):
            state = (tokens @ parts[name].T + parts[f"{name}_bias"]).reshape(5, heads, head_dim)
            state = state / np.sqrt((state**2).mean(-1, keepdims=True) + 1e-6) * parts[f"{name}_norm"]
            states.append(rotation(state, angles))  # type: ignore[operator]
        return np.einsum("ihd,jhd->hij", *states)

    np.testing.assert_allclose(
        scores(reordered, half_split_rotation), scores(weights, interleaved_rotation), rtol=1e-12, atol=1e-12
    )
