"""One contender of ``peers_cpu`` in a process of its own: ``python -m reelforge.tools.bench.peers_child JOB``.

Our engine, diffusers' transformer, or ONNX Runtime on what ``torch.onnx.export`` made of it, on all cores; or that
export itself (``system`` "export"). The protocol is that of ``openvino_child``. A job imports only what it needs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from reelforge.tools.bench.openvino_child import Step, serve

TIMESTEP = 500.0
NAMES = ("latents", "timestep", "states", "mask", "pooled", "guidance")
Loaded = tuple[Step, dict[str, str]]


def reelforge(job: dict[str, str]) -> Loaded:
    """Load a bundle's ``dit`` as a pipeline does."""
    from reelforge.runtime.bundle.open import Bundle, Check
    from reelforge.runtime.engines.onnxruntime_engine import engine_from_onnx

    bundle = Bundle.open(Path(job["bundle"]), Check.SIZES)
    engine = engine_from_onnx(bundle.graph("dit"), bundle.stage("dit"))
    with np.load(job["inputs"]) as found:
        arrays = {name: found[name] for name in engine.inputs if name in found.files}
    return lambda: engine.run(arrays, {"velocity": None})["velocity"], {}


def diffusers_arguments(job: dict[str, str], dtype: Any) -> dict[str, Any]:
    """Return the arguments of diffusers' transformer by the names of ``NAMES``."""
    import torch

    with np.load(job["inputs"]) as found:
        latents, states, pooled = (torch.from_numpy(found[name]).to(dtype) for name in ("latents", "states", "pooled"))
        guidance = torch.tensor([float(found["guidance"])], dtype=dtype)
    mask = torch.ones(states.shape[:2], dtype=torch.int64)
    values = (latents, torch.tensor([TIMESTEP]), states, mask, pooled, guidance)
    return dict(zip(NAMES, values, strict=True))


def load_diffusers(job: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """Return diffusers' transformer with its arguments as positions, ready to be exported or called."""
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = getattr(torch, job.get("dtype", "float32"))
    model = HunyuanVideoTransformer3DModel.from_pretrained(Path(job["checkpoint"]) / "transformer", torch_dtype=dtype)
    return velocity_module(model.eval()), diffusers_arguments(job, dtype)


def velocity_module(model: Any) -> Any:
    """Return a module that takes ``NAMES`` in their order and returns the velocity."""
    import torch

    class Velocity(torch.nn.Module):  # type: ignore[misc]
        """Calls the model."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, latents: Any, timestep: Any, states: Any, mask: Any, pooled: Any, guidance: Any) -> Any:
            """Return the velocity."""
            return self.model(latents, timestep, states, mask, pooled, guidance=guidance, return_dict=False)[0]

    return Velocity()


def diffusers(job: dict[str, str]) -> Loaded:
    """Load diffusers' transformer, eager or through ``torch.compile``."""
    import torch

    model, arguments = load_diffusers(job)
    run = torch.compile(model) if job.get("compiled") else model

    def step() -> Any:
        with torch.inference_mode():
            return run(*arguments.values()).float().numpy()

    return step, {}


def onnxruntime(job: dict[str, str]) -> Loaded:
    """Load an exported graph in ONNX Runtime with its default options."""
    import onnxruntime as library

    session = library.InferenceSession(job["graph"], providers=["CPUExecutionProvider"])
    with np.load(job["inputs"]) as found:
        given = {name: found[name] for name in ("latents", "states", "pooled")}
        given["guidance"] = np.array([float(found["guidance"])], np.float32)
    given |= {"timestep": np.array([TIMESTEP], np.float32), "mask": np.ones(given["states"].shape[:2], np.int64)}
    wanted = {port.name for port in session.get_inputs()}
    arrays = {name: array for name, array in given.items() if name in wanted}
    return lambda: session.run(["velocity"], arrays)[0], {}


def export_diffusers(model: Any, arguments: dict[str, Any], graph: Path) -> float:
    """Export with ``torch.onnx.export(dynamo=True)``; return the seconds."""
    import torch

    started = time.monotonic()
    torch.onnx.export(
        model,
        tuple(arguments.values()),
        str(graph),
        dynamo=True,
        external_data=True,
        input_names=list(arguments),
        output_names=["velocity"],
        verbose=False,
    )
    return time.monotonic() - started


def load_error(graph: Path) -> str:
    """Return what ONNX Runtime says against a graph, or an empty string."""
    import onnxruntime as library
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    try:
        library.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    except (errors.NotImplemented, errors.Fail, errors.InvalidGraph, errors.RuntimeException) as error:
        return str(error).splitlines()[0]
    return ""


def replace_boolean_where(graph: Path) -> int:
    """Write ``Where(mask, false, x)`` on booleans, for which ONNX Runtime has no kernel, as ``And(Not(mask), x)``.

    Returns:
        How many nodes were replaced.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    count = 0
    nodes: list[Any] = []
    for node in model.graph.node:
        if node.op_type == "Where" and types.get(node.output[0]) == onnx.TensorProto.BOOL:
            mask, _false, value = node.input
            inverse = f"{node.output[0]}_kept"
            nodes.append(onnx.helper.make_node("Not", [mask], [inverse]))
            nodes.append(onnx.helper.make_node("And", [inverse, value], [node.output[0]]))
            count += 1
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, graph)
    return count


def export(job: dict[str, str]) -> dict[str, Any]:
    """Export diffusers' transformer to ``job["graph"]``, so that ONNX Runtime takes it; say what that needed."""
    model, arguments = load_diffusers(job)
    graph = Path(job["graph"])
    seconds = export_diffusers(model, arguments, graph)
    refused = load_error(graph)
    replaced = replace_boolean_where(graph) if refused else 0
    return {
        "seconds": seconds,
        "refused": refused,
        "replaced": replaced,
        "refused_again": refused and load_error(graph),
    }


SYSTEMS: dict[str, Callable[[dict[str, str]], Loaded]] = {
    "reelforge": reelforge,
    "diffusers": diffusers,
    "onnxruntime": onnxruntime,
}


def main() -> None:
    """Do the job until stdin ends."""
    job = json.loads(sys.argv[1])
    if job["system"] == "export":
        print(json.dumps(export(job)))
        return
    serve(lambda: SYSTEMS[job["system"]](job), job["output"])


if __name__ == "__main__":
    main()
