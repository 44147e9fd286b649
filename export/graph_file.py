"""Graph files: writing a stage's ONNX file, checking it, and the digest that names what it computes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import onnx
import onnx_ir as ir

from reelforge.runtime.errors import BuildError
from reelforge.runtime.manifest import WeightEntry


def graph_bytes(model: ir.Model) -> bytes:
    """Serialise ``model``; weights stay references, and equal models give equal bytes."""
    proto: onnx.ModelProto = ir.to_proto(model)
    return bytes(proto.SerializeToString(deterministic=True))


def graph_digest(data: bytes, weights: Mapping[str, WeightEntry]) -> str:
    """Return the sha256 of a graph with each external weight replaced by its digest.

    Args:
        data: The serialised model.
        weights: Its external weights by name.
    """
    proto = onnx.ModelProto.FromString(data)
    for initializer in proto.graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            del initializer.external_data[:]
            initializer.external_data.add(key="sha256", value=weights[initializer.name].sha256)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def check_graph(data: bytes, name: str) -> None:
    """Run ONNX's checker and full type inference over a serialised model.

    External weights are presented as inputs: the checker refuses hard-linked files, and their content is not its
    matter.

    Args:
        data: The serialised model.
        name: The file's name, for messages.

    Raises:
        BuildError: With the checker's words; it is a defect of the compiler, not of the checkpoint.
    """
    proto = onnx.ModelProto.FromString(data)
    external = [weight for weight in proto.graph.initializer if weight.data_location == onnx.TensorProto.EXTERNAL]
    for weight in external:
        proto.graph.initializer.remove(weight)
        proto.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError(
            f"the graph {name} is not valid ONNX.",
            received=str(error).strip().splitlines()[0],
            expected="a graph that onnx.checker accepts",
            fix="report this with the checkpoint's configuration files",
        ) from error


def count_nodes(model: ir.Model) -> dict[str, int]:
    """Return how many nodes of each operator the model has, subgraphs included, most frequent first."""
    counts = Counter(node.op_type for node in model.graph.all_nodes())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
