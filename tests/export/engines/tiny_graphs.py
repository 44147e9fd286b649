"""Tiny graphs that compile in well under a second, and requests for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto as Kind
from onnx import helper

from reelforge.export.engines.request import Expected, PlanRequest, Profile
from reelforge.runtime.manifest import TensorInfo
from reelforge.runtime.recipe import Precision, Target

_NUMPY = {
    Kind.FLOAT: np.dtype(np.float32),
    Kind.FLOAT16: np.dtype(np.float16),
    Kind.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    Kind.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    Kind.INT8: np.dtype(np.int8),
    Kind.INT64: np.dtype(np.int64),
}
_CODES = {Precision.FP8: (Kind.FLOAT8E4M3FN, 448), Precision.INT8: (Kind.INT8, 127)}
WIDTH = 64
HEADS = 2


class Graph:
    """A graph in the making; every tensor name is given by the caller."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []

    def store(self, name: str, array: np.ndarray, kind: int) -> str:
        data = np.ascontiguousarray(array.astype(_NUMPY[kind]))
        self.stored.append(helper.make_tensor(name, kind, data.shape, data.tobytes(), raw=True))
        return name

    def node(self, operator: str, inputs: list[str], output: str, name: str, domain: str = "", **attributes) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def quantised(self, tensor: str, path: str, kind: int, codes: int, scale: float = 0.02) -> str:
        pair = [self.store(f"{path}.scale", np.array(scale), kind), self.store(f"{path}.zero", np.array(0), codes)]
        self.node("QuantizeLinear", [tensor, *pair], f"{path}.codes", f"{path}.QuantizeLinear")
        return self.node("DequantizeLinear", [f"{path}.codes", *pair], f"{path}.numbers", f"{path}.DequantizeLinear")

    def save(self, path: Path, inputs: dict[str, tuple[int, list]], outputs: dict[str, tuple[int, list]]) -> Path:
        infos = [
            [helper.make_tensor_value_info(name, *info) for name, info in each.items()] for each in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, path.stem, *infos, self.stored)
        imports = [helper.make_opsetid("", 23)]
        imports += [helper.make_opsetid(domain, 1) for domain in {node.domain for node in self.nodes} if domain]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=11), path)
        return path


def linear(graph: Graph, tensor: str, path: str, kind: int, precision: Precision | None, seed: int) -> str:
    """Add ``path``: a product with a weight ``[WIDTH, WIDTH]`` and a bias, in 8 bits if ``precision`` says so."""
    weight = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)) * 0.05
    bias = graph.store(f"{path}.bias", np.linspace(-1, 1, WIDTH), kind)
    if precision is None:
        stored = graph.store(f"{path}.weight", weight, kind)
        return graph.node("Gemm", [tensor, stored, bias], path, path, transB=1)
    codes, largest = _CODES[precision]
    scales = np.abs(weight).max(axis=1) / largest
    numbers = weight / scales[:, None]
    if precision is Precision.INT8:
        numbers = np.rint(numbers)
    activation = graph.quantised(tensor, path, kind, codes)
    parts = [
        graph.store(f"{path}.weight", numbers, codes),
        graph.store(f"{path}.weight.scale", scales, kind),
        graph.store(f"{path}.weight.zeros", np.zeros(WIDTH), codes),
    ]
    dequantised = graph.node(
        "DequantizeLinear", parts, f"{path}.weight.numbers", f"{path}.weight.DequantizeLinear", axis=0
    )
    return graph.node("Gemm", [activation, dequantised, bias], path, path, transB=1)


def save_linears(
    path: Path, precision: Precision | None = None, kind: int = Kind.BFLOAT16, blocks: int = 2, domain: str = ""
) -> Path:
    """Save ``blocks.0.fc``, GELU, ``blocks.1.fc``, GELU, ...: ``x`` [tokens, WIDTH] -> ``y``.

    Args:
        path: Where to.
        precision: None for products in ``kind``.
        kind: Of everything else.
        blocks: How many.
        domain: Of a node before the last; one that no parser knows.
    """
    graph = Graph()
    tensor = "x"
    for index in range(blocks):
        product = linear(graph, tensor, f"blocks.{index}.fc", kind, precision, seed=index)
        tensor = graph.node("Gelu", [product], f"gelu.{index}", f"blocks.{index}.gelu", approximate="tanh")
    if domain:
        tensor = graph.node("Special", [tensor], "special", "blocks.special", domain=domain)
    graph.node("Identity", [tensor], "y", "out")
    return graph.save(path, {"x": (kind, ["tokens", WIDTH])}, {"y": (kind, ["tokens", WIDTH])})


def save_attention(path: Path, kind: int = Kind.BFLOAT16, head_dim: int = 64, eight_bits: bool = False) -> Path:
    """Save ``double.0.attention`` over ``q``, ``k``, ``v`` [1, HEADS, tokens, head_dim]."""
    graph = Graph()
    names = ["q", "k", "v"]
    if eight_bits:
        names = [graph.quantised(name, f"double.0.attention.{name}", kind, Kind.FLOAT8E4M3FN) for name in names]
    graph.node("Attention", names, "y", "double.0.Attention", scale=head_dim**-0.5)
    shape = [1, HEADS, "tokens", head_dim]
    return graph.save(path, dict.fromkeys("qkv", (kind, shape)), {"y": (kind, shape)})


def request_for(
    graph: Path,
    target: str,
    expected: Expected | None = None,
    profiles: tuple[Profile, ...] = (Profile("default", {"tokens": (32, 128, 256)}),),
    out: Path | None = None,
) -> PlanRequest:
    """Return a request whose inputs and outputs are read off the graph."""
    model = onnx.load(graph)
    out = out or graph.parent / graph.stem
    return PlanRequest(
        stage="toy",
        graph=str(graph),
        inputs=tuple(_info(value) for value in model.graph.input),
        outputs=tuple(_info(value) for value in model.graph.output),
        target=Target.parse(target),
        profiles=profiles,
        expected=expected or Expected(),
        plan=str(out / "toy.plan"),
        receipt=str(out / "toy.json"),
        scratch=str(out / "scratch"),
    )


def expect_linears(precision: Precision, blocks: int = 2) -> Expected:
    return Expected(layers={f"blocks.{index}.fc": precision for index in range(blocks)})


def expect_attention(precision: Precision) -> Expected:
    return Expected(attentions={"double.0.attention": precision})


def with_plan(request: PlanRequest, folder: Path) -> PlanRequest:
    """Return the request with its results in ``folder``."""
    return dataclasses.replace(
        request, plan=str(folder / "toy.plan"), receipt=str(folder / "toy.json"), scratch=str(folder / "scratch")
    )


def _info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape = tuple(dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim)
    return TensorInfo(value.name, _NUMPY[tensor.elem_type].name, shape)
