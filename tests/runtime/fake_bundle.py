"""A complete bundle without a compiler: six tiny graphs made by hand whose results NumPy can restate in a few lines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from reelforge.runtime.bundle.write import BundleWriter
from reelforge.runtime.manifest import (
    SCHEMA_VERSION,
    Manifest,
    PromptTemplate,
    StageEntry,
    TensorInfo,
    WeightEntry,
)
from reelforge.runtime.recipe import Backend, Precision, Recipe, Target, VideoShape
from reelforge.runtime.spec import (
    ClipSpec,
    DitSpec,
    GuidanceRounding,
    LlmSpec,
    ModelSpec,
    SamplerDefaults,
    VaeSpec,
    VaeTiling,
)

WIDTH, TEXT_WIDTH, POOLED_WIDTH, SINUSOID = 8, 6, 4, 16
DOUBLE, SINGLE, CHANNELS = 2, 3, 4
VOCABULARY = 300
STAGES = ("llm", "clip", "refiner", "modulation", "dit", "vae_decoder")
GUIDED = (*STAGES, "guidance")
CACHED = (*GUIDED, "step_change", "step_reuse", "input_change")

SPEC = ModelSpec(
    family="fake",
    llm=LlmSpec(TEXT_WIDTH, 2, 1, 1, 1, 6, 8, VOCABULARY, 10000.0, 1e-5, 20),
    clip=ClipSpec(POOLED_WIDTH, 1, 1, 8, VOCABULARY, 12, 1e-5, "quick_gelu", 257),
    dit=DitSpec(
        WIDTH, 1, 8, DOUBLE, SINGLE, 1, 16, CHANNELS, (1, 2, 2), TEXT_WIDTH, POOLED_WIDTH, (4, 2, 2), 256.0, SINUSOID,
        1e-6, True,
    ),
    vae=VaeSpec(CHANNELS, (8, 8, 8, 8), 1, 2, 1e-6, 0.5, 8, 4),
    tiling=VaeTiling(tile=4, stride=3, frame_window=2, frame_stride=1),
    guidance_rounding=GuidanceRounding.BF16,
    defaults=SamplerDefaults(steps=4, shift=7.0, guidance=6.0, height=48, width=64, frames=13, frames_per_second=24),
)  # fmt: skip
PREFIX = "Tell: "
TEMPLATE = PromptTemplate(PREFIX + "{}.", crop_start=1 + len(PREFIX), source="test")


@dataclass
class Graph:
    """One stage's graph under construction."""

    name: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    external: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def finish(self, writer: BundleWriter) -> StageEntry:
        weights, blob = [], b""
        file = f"weights/{self.name}.safetensors"
        initializers = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        for name, value in self.external.items():
            data = np.ascontiguousarray(value, np.float32).tobytes()
            digest = hashlib.sha256(data).hexdigest()
            weights.append(WeightEntry(name, "F32", value.shape, file, len(blob), len(data), digest))
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=value.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, item in (("location", file), ("offset", len(blob)), ("length", len(data))):
                tensor.external_data.add(key=key, value=str(item))
            initializers.append(tensor)
            blob += data
        if blob:
            writer.add_bytes(file, blob)
        graph = helper.make_graph(
            self.nodes, self.name, [_value(i) for i in self.inputs], [_value(o) for o in self.outputs], initializers
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        data = model.SerializeToString()
        writer.add_bytes(f"{self.name}.onnx", data)
        nodes: dict[str, int] = {}
        for node in self.nodes:
            nodes[node.op_type] = nodes.get(node.op_type, 0) + 1
        digest = hashlib.sha256(data).hexdigest()
        return StageEntry(
            self.name, f"{self.name}.onnx", digest, tuple(self.inputs), tuple(self.outputs), tuple(weights), 2e-5, 1e-6,
            nodes,
        )  # fmt: skip


def _value(info: TensorInfo) -> onnx.ValueInfoProto:
    kind = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}[info.dtype]
    return helper.make_tensor_value_info(info.name, kind, info.shape)


def _info(name: str, *shape: int | str, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name, dtype, shape)


def constant(name: str, *shape: int) -> np.ndarray:
    """The weights: drawn from the name, so that an oracle can ask for them again."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return (np.random.default_rng(seed).standard_normal(shape) * 0.3).astype(np.float32)


def llm() -> Graph:
    graph = Graph(
        "llm",
        [_info("input_ids", "batch", "prompt_tokens", dtype="int64")],
        [_info("prompt_states", "batch", "prompt_tokens", TEXT_WIDTH)],
    )
    graph.external["embed_tokens.weight"] = constant("llm", VOCABULARY, TEXT_WIDTH)
    graph.external["unused.weight"] = constant("unused", 7)
    graph.add("Gather", ["embed_tokens.weight", "input_ids"], "prompt_states")
    return graph


def clip() -> Graph:
    graph = Graph(
        "clip",
        [_info("clip_ids", "batch", "clip_tokens", dtype="int64")],
        [_info("pooled_text", "batch", POOLED_WIDTH)],
    )
    graph.constants["table"] = constant("clip", VOCABULARY, POOLED_WIDTH)
    graph.constants["axis"] = np.array([1], np.int64)
    graph.add("Gather", ["table", "clip_ids"], "states")
    graph.add("ReduceMean", ["states", "axis"], "pooled_text", keepdims=0)
    return graph


def refiner() -> Graph:
    graph = Graph(
        "refiner",
        [_info("text_states", 1, "text_tokens", TEXT_WIDTH), _info("timestep_embedding", "steps", SINUSOID)],
        [_info("text", "steps", "text_tokens", WIDTH)],
    )
    graph.constants["by_text"] = constant("by_text", TEXT_WIDTH, WIDTH)
    graph.constants["by_time"] = constant("by_time", SINUSOID, WIDTH)
    graph.constants["axis"] = np.array([1], np.int64)
    graph.add("MatMul", ["text_states", "by_text"], "a")
    graph.add("MatMul", ["timestep_embedding", "by_time"], "b")
    graph.add("Unsqueeze", ["b", "axis"], "c")
    graph.add("Add", ["a", "c"], "text")
    return graph


def modulation() -> Graph:
    graph = Graph(
        "modulation",
        [
            _info("timestep_embedding", "steps", SINUSOID),
            _info("guidance_embedding", 1, SINUSOID),
            _info("pooled_text", 1, POOLED_WIDTH),
        ],
        [
            _info("double_modulation", "steps", DOUBLE, 2, 6, WIDTH),
            _info("single_modulation", "steps", SINGLE, 3, WIDTH),
            _info("final_modulation", "steps", 2, WIDTH),
        ],
    )
    graph.constants["time"] = constant("time", SINUSOID, WIDTH)
    graph.constants["guidance"] = constant("guidance", SINUSOID, WIDTH)
    graph.constants["pooled"] = constant("pooled", POOLED_WIDTH, WIDTH)
    graph.add("MatMul", ["timestep_embedding", "time"], "a")
    graph.add("MatMul", ["guidance_embedding", "guidance"], "b")
    graph.add("MatMul", ["pooled_text", "pooled"], "c")
    graph.add("Sum", ["a", "b", "c"], "sum")
    for name, shape in (("double", (DOUBLE, 2, 6)), ("single", (SINGLE, 3)), ("final", (2,))):
        graph.constants[f"{name}_axes"] = np.arange(1, 1 + len(shape), dtype=np.int64)
        graph.constants[f"{name}_bias"] = constant(name, 1, *shape, WIDTH)
        graph.add("Unsqueeze", ["sum", f"{name}_axes"], f"{name}_row")
        graph.add("Add", [f"{name}_row", f"{name}_bias"], f"{name}_modulation")
    return graph


def dit(batch: bool = False) -> Graph:
    size: int | str = "batch"
    latents = ("batch", CHANNELS, "latent_frames", "latent_height", "latent_width")
    graph = Graph(
        "dit",
        [
            _info("latents", *latents),
            _info("text", size, "text_tokens", WIDTH),
            _info("double_modulation", size, DOUBLE, 2, 6, WIDTH),
            _info("single_modulation", size, SINGLE, 3, WIDTH),
            _info("final_modulation", size, 2, WIDTH),
            _info("rope_cos", "image_tokens", SPEC.dit.head_dim // 2),
            _info("rope_sin", "image_tokens", SPEC.dit.head_dim // 2),
            _info("sigma_step"),
            *([_info("text_lengths", size, dtype="int64")] if batch else []),
        ],
        [_info("velocity", *latents), _info("next_latents", *latents)],
    )
    graph.constants["half"] = np.array(0.5, np.float32)
    graph.add("Mul", ["latents", "half"], "scaled")
    means = []
    for info in graph.inputs[1:7]:
        means.append(graph.add("ReduceMean", [info.name], f"mean_{info.name}", keepdims=0))
    graph.add("Sum", means, "offset")
    graph.add("Add", ["scaled", "offset"], "velocity")
    graph.add("Mul", ["sigma_step", "velocity"], "update")
    graph.add("Add", ["latents", "update"], "next_latents")
    return graph


def guidance() -> Graph:
    latents = ("batch", CHANNELS, "latent_frames", "latent_height", "latent_width")
    graph = Graph(
        "guidance",
        [
            *(_info(name, *latents) for name in ("latents", "velocity", "negative_velocity")),
            _info("scale"),
            _info("sigma_step"),
        ],
        [_info("guided_velocity", *latents), _info("next_latents", *latents)],
    )
    graph.add("Sub", ["velocity", "negative_velocity"], "difference")
    graph.add("Mul", ["scale", "difference"], "scaled")
    graph.add("Add", ["negative_velocity", "scaled"], "guided_velocity")
    graph.add("Mul", ["sigma_step", "guided_velocity"], "update")
    graph.add("Add", ["latents", "update"], "next_latents")
    return graph


def step_change() -> Graph:
    latents = ("batch", CHANNELS, "latent_frames", "latent_height", "latent_width")
    names = ("latents", "previous_latents", "computed_latents", "velocity", "earlier_latents", "earlier_velocity")
    graph = Graph(
        "step_change", [_info(name, *latents) for name in names], [_info("predicted_change"), _info("residual_ratio")]
    )
    graph.constants["channels"] = np.array([1], np.int64)

    def size(tensor: str) -> str:
        return graph.add("ReduceMean", [graph.add("Abs", [tensor], f"|{tensor}|")], f"mean |{tensor}|", keepdims=0)

    def norm(velocity: str, latents: str) -> str:
        residual = graph.add("Sub", [velocity, latents], f"{velocity} residual")
        return graph.add("ReduceL2", [residual, "channels"], f"{velocity} norm", keepdims=0)

    changed = size(graph.add("Sub", ["velocity", "earlier_velocity"], "dv"))
    rate = graph.add("Div", [changed, size(graph.add("Sub", ["computed_latents", "earlier_latents"], "dx"))], "rate")
    moved = graph.add("Mul", [rate, size(graph.add("Sub", ["latents", "previous_latents"], "step"))], "moved")
    graph.add("Div", [moved, size("velocity")], "predicted_change")
    ratios = [norm("velocity", "computed_latents"), norm("earlier_velocity", "earlier_latents")]
    graph.add("ReduceMean", [graph.add("Div", ratios, "ratios")], "residual_ratio", keepdims=0)
    return graph


def step_reuse() -> Graph:
    latents = ("batch", CHANNELS, "latent_frames", "latent_height", "latent_width")
    tensors = ("latents", "computed_latents", "velocity", "earlier_velocity")
    weights = ("residual_weight", "trend_weight", "sigma_step")
    graph = Graph(
        "step_reuse",
        [*(_info(name, *latents) for name in tensors), *(_info(name) for name in weights)],
        [_info("next_latents", *latents)],
    )
    since = graph.add("Sub", ["latents", "computed_latents"], "since")
    trend = graph.add("Sub", ["velocity", "earlier_velocity"], "trend")
    graph.add("Mul", ["residual_weight", since], "residual part")
    graph.add("Mul", ["trend_weight", trend], "trend part")
    graph.add("Sum", ["velocity", "residual part", "trend part"], "reused")
    graph.add("Mul", ["sigma_step", "reused"], "update")
    graph.add("Add", ["latents", "update"], "next_latents")
    return graph


def input_change() -> Graph:
    """A first block that is given the latents, shifted by the mean of its modulation."""
    latents = ("batch", CHANNELS, "latent_frames", "latent_height", "latent_width")
    graph = Graph(
        "input_change",
        [
            *(_info(name, *latents) for name in ("latents", "previous_latents")),
            *(_info(name, "batch", DOUBLE, 2, 6, WIDTH) for name in ("double_modulation", "previous_modulation")),
        ],
        [_info("input_change")],
    )

    def mean(tensor: str) -> str:
        return graph.add("ReduceMean", [tensor], f"mean {tensor}", keepdims=0)

    def size(tensor: str) -> str:
        return mean(graph.add("Abs", [tensor], f"|{tensor}|"))

    graph.add("Add", ["latents", mean("double_modulation")], "given")
    graph.add("Add", ["previous_latents", mean("previous_modulation")], "before")
    graph.add("Div", [size(graph.add("Sub", ["given", "before"], "moved")), size("before")], "input_change")
    return graph


def vae_decoder() -> Graph:
    graph = Graph(
        "vae_decoder",
        [_info("latent_tile", 1, CHANNELS, "tile_frames", "tile_height", "tile_width")],
        [_info("frame_tile", 1, 3, "video_frames", "video_height", "video_width")],
    )
    graph.external["decoder.weight"] = constant("decoder", 3, CHANNELS, 1, 1, 1)
    graph.constants["scales"] = np.array([1, 1, 4, 8, 8], np.float32)
    graph.constants["starts"], graph.constants["ends"] = np.array([3], np.int64), np.array([2**31], np.int64)
    graph.constants["axes"] = np.array([2], np.int64)
    graph.add("Conv", ["latent_tile", "decoder.weight"], "mixed")
    graph.add("Resize", ["mixed", "", "scales"], "large", mode="nearest", coordinate_transformation_mode="asymmetric",
              nearest_mode="floor")  # fmt: skip
    graph.add("Slice", ["large", "starts", "ends", "axes"], "cut")
    graph.add("Tanh", ["cut"], "frame_tile")
    return graph


def byte_tokenizer(begin: str, end: str | None) -> Tokenizer:
    """One token per byte, 256 for ``begin`` and 257 for ``end``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([begin, *([end] if end else [])])
    specials = [(begin, 256), *([(end, 257)] if end else [])]
    single = f"{begin} $A" + (f" {end}" if end else "")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    # What a file from a training run may carry, and the runtime must not obey.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    return tokenizer


def write_fake_bundle(
    destination: Path, shapes: tuple[VideoShape, ...] = (), stages: tuple[str, ...] = STAGES, spec: ModelSpec = SPEC,
    batch: int = 1,
) -> Manifest:  # fmt: skip
    """Write a bundle of the stages named, and return its manifest."""
    makers = {
        "llm": llm, "clip": clip, "refiner": refiner, "modulation": modulation, "dit": lambda: dit(batch > 1),
        "guidance": guidance, "step_change": step_change, "step_reuse": step_reuse,
        "input_change": input_change, "vae_decoder": vae_decoder,
    }  # fmt: skip
    with BundleWriter(destination) as writer:
        entries = tuple(makers[name]().finish(writer) for name in stages)
        byte_tokenizer("<s>", None).save(str(writer.path("tokenizers/llm.json")))
        byte_tokenizer("<a>", "<z>").save(str(writer.path("tokenizers/clip.json")))
        recipe = Recipe.uniform(Precision.FP32, stages, shapes, batch)
        return writer.seal(
            Manifest(
                SCHEMA_VERSION, spec, Target(Backend.CPU), recipe, TEMPLATE, entries, (), {"reelforge": "test"}, ""
            )
        )
