"""Problems on a real GPU for ``attention_measure``: random inputs, launches, times, float64 results of some queries.

Needs a GPU and PyTorch with CUDA. What is launched is the shipped PTX with the schema's parameters. Times are of single
launches between CUDA events on the default stream, after warming up; clocks are as found.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reelforge.plugins.compile import CompiledKernel
from reelforge.plugins.cuda_driver import LoadedKernel

HEADS, HEAD_DIM = 24, 128
CHECKED_QUERIES = 48


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated launches."""

    median: float
    least: float
    most: float
    repeats: int

    def as_json(self) -> dict[str, float | int]:
        """Return the numbers, rounded to what is meaningful."""
        return {
            "median_ms": round(self.median, 4),
            "least_ms": round(self.least, 4),
            "most_ms": round(self.most, 4),
            "repeats": self.repeats,
        }


def time_ms(call: Callable[[], object], repeats: int, warmup: int = 2) -> Timing:
    """Return the time of ``call``'s work on the current stream."""
    import torch

    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return Timing(statistics.median(times), min(times), max(times), repeats)


class Problem:
    """Random inputs of one size and everything that kernels made of them, on the GPU.

    Args:
        tokens: Image and text together.
        text: Of which the last so many are text.
        seed: Of the inputs.
        heads: Number of heads.
    """

    def __init__(self, tokens: int, text: int, seed: int, heads: int = HEADS) -> None:
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Any:
            return torch.randn(shape, generator=generator, device="cuda")

        self.tokens, self.heads, self.image = tokens, heads, tokens - text
        self.sizes = {"batch": 1, "tokens": tokens, "heads": heads, "head_dim": HEAD_DIM, "image_tokens": self.image}
        self.sizes["norms"] = 2
        angles = 6.3 * torch.rand((self.image, HEAD_DIM // 2), generator=generator, device="cuda")
        shape = (1, tokens, heads, HEAD_DIM)
        self.tensors: dict[str, Any] = {
            "q": normal(*shape).bfloat16(),
            "k": (normal(*shape) + 2 * normal(HEAD_DIM)).bfloat16(),
            "v": (normal(*shape) + normal(heads, HEAD_DIM)).bfloat16(),
            "query_norm": 1 + 0.2 * normal(2, HEAD_DIM),
            "key_norm": 1 + 0.2 * normal(2, HEAD_DIM),
            "rope_cos": angles.cos(),
            "rope_sin": angles.sin(),
            "key_lengths": torch.tensor([tokens], dtype=torch.int32, device="cuda"),
        }
        self._loaded: dict[str, LoadedKernel] = {}

    def prepare(self, kernel: CompiledKernel) -> Callable[[], None]:
        """Allocate the outputs of ``kernel`` and return a function that launches it."""
        import torch

        schema, constants = kernel.variant.schema, kernel.variant.constants()
        if kernel.variant.name not in self._loaded:
            self._loaded[kernel.variant.name] = LoadedKernel(kernel)
        loaded = self._loaded[kernel.variant.name]
        for tensor in schema.outputs:
            dtype = getattr(torch, (tensor.dtype or kernel.variant.activation).numpy_name)
            shape = schema.output_shapes(self.sizes, constants)[tensor.name]
            poison = torch.full(shape, 113, dtype=torch.uint8, device="cuda") if dtype.itemsize == 1 else None
            # Float outputs start as NaN, so that what is not written shows.
            self.tensors[tensor.name] = (
                torch.full(shape, float("nan"), dtype=dtype, device="cuda") if poison is None else poison.view(dtype)
            )
        names = [tensor.name for tensor in (*schema.inputs, *schema.outputs)]
        pointers = {name: self.tensors[name].data_ptr() for name in names}
        stream = torch.cuda.current_stream().cuda_stream
        return lambda: loaded.launch(pointers, self.sizes, stream)

    def rotated(self) -> tuple[Any, Any]:
        """Return q and k after norm and rotation in fp32, [L, H, D], computed by PyTorch."""
        return self._rotate("q", "query_norm"), self._rotate("k", "key_norm")

    def _rotate(self, name: str, norm_name: str) -> Any:
        import torch

        x, norm = self.tensors[name][0].float(), self.tensors[norm_name]
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        x[: self.image] *= norm[0]
        x[self.image :] *= norm[1]
        cos, sin = (self.tensors[table][:, None, :] for table in ("rope_cos", "rope_sin"))
        first, second = x[: self.image].chunk(2, dim=-1)
        x[: self.image] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return x

    def exact(self, rows: Any, visible: Any | None = None) -> Any:
        """Return attention's result for some queries in float64, [rows, H, D].

        Args:
            rows: Token numbers.
            visible: Bool [H, rows, L]; None if every query sees every key.
        """
        import torch

        q, k = self.rotated()
        results = []
        for head in range(self.heads):
            scores = q[rows, head].double() @ k[:, head].double().T / HEAD_DIM**0.5
            if visible is not None:
                scores = scores.masked_fill(~visible[head], float("-inf"))
            results.append(scores.softmax(-1) @ self.tensors["v"][0, :, head].double())
        return torch.stack(results, dim=1)


def errors(result: Any, exact: Any) -> dict[str, float]:
    """Return cosine and relative L1 error of ``result`` against ``exact``, computed in float64."""
    a, b = result.double().flatten(), exact.flatten()
    cosine = float((a @ b) / (a.norm() * b.norm()))
    return {"cosine": cosine, "relative_l1": float((a - b).abs().sum() / b.abs().sum())}


def operations(tokens: int, heads: int = HEADS) -> float:
    """Return multiplications and additions of dense attention's two products."""
    return 4.0 * tokens * tokens * HEAD_DIM * heads


def some_rows(tokens: int) -> Any:
    """Return token numbers spread over the sequence, the first and last among them."""
    import torch

    return torch.linspace(0, tokens - 1, CHECKED_QUERIES, device="cuda").long()


def torch_attention(problem: Problem, backend: str) -> Callable[[], Any]:
    """Return a call of PyTorch's attention in bf16 with one of its backends: ``flash`` or ``cudnn``."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]
    q, k = (x.bfloat16()[None].transpose(1, 2).contiguous() for x in problem.rotated())
    v = problem.tensors["v"].transpose(1, 2).contiguous()

    def call() -> Any:
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return call
