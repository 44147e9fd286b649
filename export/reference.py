"""Reference execution of a stage in PyTorch, one part at a time, with weights read where they lie.

What a graph is compared with. Only one part's weights are in memory at once, so a stage of any depth can be run. The
module knows no ONNX: it is the same module classes that were traced, fed from the same file ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reelforge.export.stage import Stage
from reelforge.runtime.manifest import WeightEntry

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_weight(folder: Path, entry: WeightEntry) -> Tensor:
    """Return the weight as fp32, copied out of ``folder / entry.file``."""
    raw = np.fromfile(folder / entry.file, dtype=np.uint8, count=entry.length, offset=entry.offset)
    return torch.from_numpy(raw).view(_STORED[entry.dtype]).reshape(entry.shape).float()


def run_stage(
    stage: Stage,
    folder: Path,
    weights: Mapping[str, WeightEntry],
    inputs: Mapping[str, np.ndarray],
    dtype: torch.dtype = torch.float32,
) -> dict[str, np.ndarray]:
    """Run ``stage`` in PyTorch.

    Args:
        stage: What to run.
        folder: The bundle's folder, which the entries' files are relative to.
        weights: The stage's weights by name.
        inputs: By name, shaped as the stage declares.
        dtype: Of parameters and values inside; what crosses the stage's boundaries is fp32 all the same.

    Returns:
        The stage's outputs by name.
    """
    environment = {stage.value_of(name): torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in stage.inputs}
    collected: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for part in stage.parts:
            module = part.build().eval().to(dtype)
            for index, prefix in enumerate(part.prefixes(), part.first):
                with torch.no_grad():
                    for name, parameter in module.named_parameters():
                        parameter.copy_(read_weight(folder, weights[prefix + name]))
                arguments = [
                    environment[port.value][:, index] if port.indexed else environment[port.value]
                    for port in part.input_ports
                ]
                results = module(*arguments)
                results = results if isinstance(results, tuple) else (results,)
                for port, result in zip(part.output_ports, results, strict=True):
                    if port.indexed:
                        collected.setdefault(port.value, []).append(result)
                    else:
                        environment[port.value] = result
    for name, rows in collected.items():
        before = [environment[earlier] for earlier in stage.earlier.get(name, ())]
        environment[name] = torch.cat([*before, torch.stack(rows, dim=1)], dim=1)
    return {name: environment[stage.value_of(name)].numpy() for name in stage.outputs}
