"""Runs plugins on the GPU with the interface of the interpreter: the shipped PTX, launched as an engine launches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from reelforge.plugins.compile import compile_kernels
from reelforge.plugins.cuda_driver import LoadedKernel
from reelforge.plugins.schema import PLUGINS, DType
from reelforge.plugins.tactics import Variant, variants


@dataclass
class GpuRunner:
    """Compiles what it needs.

    Attributes:
        architecture: Of the GPU.
        cache: Folder of compiled kernels.
        tactic: Which of several tactics of an attention kernel to take, by its place among those that fit.
    """

    architecture: int
    cache: Path
    tactic: int = 0

    def run(
        self, plugin: str, inputs: Mapping[str, NDArray[Any]], constants: Mapping[str, int | float], activation: DType
    ) -> dict[str, NDArray[Any]]:
        import torch

        variant = self.variant(plugin, constants, activation)
        (kernel,) = compile_kernels([variant], self.cache)
        schema, constants = PLUGINS[plugin], variant.constants()
        shapes = {name: array.shape for name, array in inputs.items()}
        schema.check_inputs(shapes, constants)
        sizes = schema.sizes(shapes)
        tensors = {name: _to_gpu(array) for name, array in inputs.items()}
        for tensor in schema.outputs:
            shape = schema.output_shapes(sizes, constants)[tensor.name]
            dtype = tensor.dtype or activation
            poison = np.full(
                (*shape, dtype.size), 0x7F if dtype.size > 1 else 113, np.uint8
            )  # NaN if it is not written
            tensors[tensor.name] = torch.from_numpy(poison).cuda()
        stream = torch.cuda.current_stream().cuda_stream
        LoadedKernel(kernel).launch({name: t.data_ptr() for name, t in tensors.items()}, sizes, stream)
        torch.cuda.synchronize()
        outputs = {}
        for tensor in schema.outputs:
            dtype = tensor.dtype or activation
            outputs[tensor.name] = tensors[tensor.name].cpu().numpy().view(_numpy_type(dtype))[..., 0]
        return outputs

    def variant(self, plugin: str, constants: Mapping[str, int | float], activation: DType) -> Variant:
        head_dim = int(constants["HEAD_DIM"])
        fixed = {name: value for name, value in constants.items() if name in ("KEY_GROUP", "RANGE")}
        found = [
            variant
            for variant in variants(self.architecture, activation, head_dim, plugin)
            if fixed.items() <= variant.constants().items()
        ]
        return found[self.tactic % len(found)]


def _numpy_type(dtype: DType) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, dtype.numpy_name, None) or dtype.numpy_name)


def _to_gpu(array: NDArray[Any]) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)[..., None].view(np.uint8).copy()).cuda()
