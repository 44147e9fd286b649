"""Attentions become plugins: the lowered graph, executed with the plugins' functions, against the captured one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import PostconditionError, common

from reelforge.export.lower import EightBit, PluginAttentions, lower, passes_for
from reelforge.export.passes.lower_attention import AddPluginFunctionsPass, LowerAttentionPass
from reelforge.export.passes.lower_block_sparse_attention import LowerBlockSparseAttentionPass
from reelforge.export.passes.lower_key_lengths import LowerKeyLengthsPass
from reelforge.export.passes.quantise_attention import AttentionScales
from reelforge.plugins.attention_choice import ATTENTION_PLUGINS
from reelforge.plugins.registration import OUTPUT_TYPE
from reelforge.plugins.schema import NAMESPACE, PLUGINS
from reelforge.plugins.tactics import tactics
from reelforge.runtime.errors import BuildError
from reelforge.runtime.recipe import Target
from tests.export.passes.attention_models import (
    ATTENTIONS,
    ONE_STREAM,
    TWO_STREAMS,
    attention_inputs,
    attention_model,
    attention_text,
    needed,
)
from tests.export.passes.portable_model import run

NAME = "double.0.attention"
NAMES = (NAME,)


def lowered(text: str, architecture: str = "sm90", **options: object) -> ir.Model:
    model = attention_model(text)
    LowerAttentionPass(NAMES, ATTENTION_PLUGINS[architecture], **options)(model)  # type: ignore[arg-type]
    common.RemoveUnusedNodesPass()(model)
    AddPluginFunctionsPass()(model)
    return model


def plugins_of(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.domain == NAMESPACE]


def difference(received: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((received - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("architecture", ATTENTION_PLUGINS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("streams", [ONE_STREAM, TWO_STREAMS], ids=["one stream", "two streams"])
def test_the_chain_is_the_attention(streams: str, attention: str, architecture: str) -> None:
    """Beside an attention in fp32. P in e4m3 is off by 1/45 on average, which averages out in part."""
    text = attention_text(streams, attention)
    arrays = attention_inputs(batch=2)
    plain = attention_model(text)
    LowerKeyLengthsPass()(plain)
    LowerBlockSparseAttentionPass()(plain)
    (wanted,) = run(plain, **needed(plain, arrays))
    model = lowered(text, architecture)
    (received,) = run(model, **needed(model, arrays))
    choice = ATTENTION_PLUGINS[architecture]
    plugin = choice.sparse if attention == "sparse" else choice.dense
    values = [] if "fp16_attention" in plugin else ["value_statistics", "value_quantise"]
    assert plugins_of(model) == ["key_statistics", "rotary_qk_norm_quantise", *values, plugin]
    assert difference(received, wanted) < (0.03 if values else 0.008)
    if attention == "lengths":  # the second video does not see its last keys
        arrays["text"][1, -5:] += 3
        (again,) = run(model, **needed(model, arrays))
        np.testing.assert_array_equal(again[0], received[0])
        assert difference(again[1, :-5], received[1, :-5]) < 0.02  # K's mean alone sees them


def test_what_the_nodes_say() -> None:
    model = lowered(attention_text(ONE_STREAM), "sm89")
    nodes = {node.op_type: node for node in model.graph if node.domain == NAMESPACE}
    assert {node.name for node in nodes.values()} == {f"{NAME}.{plugin}" for plugin in nodes}
    assert nodes["value_quantise"].attributes["value_range"].as_float() == 2.25
    attention = nodes["int8_fp8_attention_fp16_accumulator"]
    assert attention.attributes["key_group"].as_int() == 64
    assert attention.attributes[OUTPUT_TYPE].as_string() == "bf16"
    assert nodes["key_statistics"].attributes["eps"].as_float() == pytest.approx(1e-6)
    assert {key[1] for key in model.functions} == set(nodes)


@pytest.mark.parametrize("architecture", ATTENTION_PLUGINS)
def test_the_table_names_kernels_that_there_are(architecture: str) -> None:
    choice, number = ATTENTION_PLUGINS[architecture], int(architecture.removeprefix("sm"))
    assert choice.key_group in choice.key_groups
    for plugin in (choice.dense, choice.sparse):
        groups = {tactic.tiles["BLOCK_N"] for tactic in tactics(plugin, number)}
        assert groups == set(choice.key_groups)
    assert tactics("rotary_qk_norm_quantise", number)
    assert PLUGINS[choice.dense].constants["PV"] == PLUGINS[choice.sparse].constants["PV"]


REFUSALS: Sequence[tuple[str, str, str]] = [
    ("Attention (q, k, v)", "Attention <is_causal = 1> (q, k, v)", "it has is_causal=1"),
    ("Attention (q, k, v)", "Attention <softcap = 5.0> (q, k, v)", "it has softcap=5"),
    ("Attention (q, k, v)", "Attention <scale = 0.5> (q, k, v)", "its scale is 0.5"),
    ("Attention (q, k, v)", "Attention (q, k, v, zero)", "it has a mask or a cache"),
    ("q = Transpose <perm = [0, 2, 1, 3]>", "q = Transpose <perm = [0, 2, 3, 1]>", "q is transposed from"),
    ("q = Transpose <perm = [0, 2, 1, 3]> (q_turned)", "q = Identity (q_turned)", "q by head is made by Identity"),
    ("(q_first, q_second)", "(q_first, q_second, q_second)", "not joined of two halves"),
    ("q_first = Sub", "q_first = Add", "the first half of q before attention is made by Add, not by Sub"),
    ("q_as = Mul (q_a, sin)", "q_as = Mul (q_b, sin)", "q before attention is not a rotation of its halves"),
    ("q_a, q_b = Split <axis = 3,", "q_b, q_a = Split <axis = 3,", "the halves of q are not the two of one split"),
    ("q_a, q_b = Split <axis = 3,", "q_a, q_b = Split <axis = 2,", "q is split along another axis"),
    ("cos = Unsqueeze (joint_cos, axis)", "cos = Identity (joint_cos)", "a table that rotates q is made by Identity"),
    ("cos = Unsqueeze (joint_cos, axis)",
     "zeroth = Constant <value = int64[1] {0}> ()\ncos = Unsqueeze (joint_cos, zeroth)",
     "a table that rotates q is not one of tokens, the same for all heads"),
    ("iqn = RMSNormalization <axis = -1,", "iqn = RMSNormalization <axis = 2,", "q is not normalised over"),
    ("iqn = RMSNormalization <axis = -1, epsilon = 0.000001>", "iqn = LayerNormalization <axis = -1>", "made by Layer"),
    ("iqn = RMSNormalization <axis = -1, epsilon = 0.000001>", "iqn = RMSNormalization <axis = -1, epsilon = 0.1>",
     "the norms of q have different epsilons"),
    ("qn = Concat <axis = 1> (iqn, tqn)", "qn = Concat <axis = 1> (iqn, tqn, tqn)", "q is not joined of image"),
    ("kn = Concat <axis = 1> (ikn, tkn)", "kn = Identity (ikn)", "k before its rotation is made by Identity"),
    ("qn = Concat <axis = 1> (iqn, tqn)", "qn = Concat <axis = 1> (tqn, iqn)",
     "q and k of the image are not projected from the same tokens"),
    ("ones = Expand (one,", "ones = Expand (zero,", "the rows of joint_cos that belong to text are not 1"),
    ("zeros = Expand (zero, tail_shape)", "zeros = Sin (ones)", "the rows of joint_sin that belong to text are not 0"),
    ("joint_cos = Concat <axis = 0> (rope_cos, ones)", "joint_cos = Identity (rope_cos)",
     "a rotary table of image and text is made by Identity"),
    ("out = Transpose <perm = [0, 2, 1, 3]>", "out = Transpose <perm = [0, 1, 2, 3]>", "its result is not put back"),
    ("out = Transpose <perm = [0, 2, 1, 3]> (attended)", "out = Relu (attended)", "its result goes to Relu, not to"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "reason"), REFUSALS)
def test_what_does_not_match_is_refused_with_its_reason(old: str, new: str, reason: str) -> None:
    text = attention_text()
    assert old in text
    model = attention_model(text.replace(old, new, 1))
    before = [node.name for node in model.graph]
    with pytest.raises(BuildError, match=r"the attention double\.0\.attention of 'dit' cannot be") as caught:
        LowerAttentionPass(NAMES, ATTENTION_PLUGINS["sm90"])(model)
    assert reason in str(caught.value)
    assert "fix: use a target rtx" in str(caught.value)
    assert [node.name for node in model.graph] == before


def test_tables_of_q_and_k_differ() -> None:
    text = attention_text().replace("k_bc = Mul (k_b, cos)", "k_bc = Mul (k_b, sin)")
    text = text.replace("k_ac = Mul (k_a, cos)", "k_ac = Mul (k_a, sin)")
    with pytest.raises(BuildError, match="q and k are rotated by different tables"):
        LowerAttentionPass(NAMES, ATTENTION_PLUGINS["sm90"])(attention_model(text))


def test_epsilons_of_q_and_k_differ() -> None:
    text = attention_text(ONE_STREAM).replace("kn = RMSNormalization <axis = -1, epsilon = 0.000001>",
                                              "kn = RMSNormalization <axis = -1, epsilon = 0.5>")  # fmt: skip
    with pytest.raises(BuildError, match=r"the norms of q and k have different epsilons, 1e-06 and 0\.5"):
        LowerAttentionPass(NAMES, ATTENTION_PLUGINS["sm90"])(attention_model(text))


def test_one_stream_of_q_and_two_of_k() -> None:
    text = attention_text().replace("qn = Concat <axis = 1> (iqn, tqn)",
                                    "qn = RMSNormalization <axis = -1, epsilon = 0.000001> (iq, q_norm)")  # fmt: skip
    with pytest.raises(BuildError, match="q is joined of 1 streams and k of 2"):
        LowerAttentionPass(NAMES, ATTENTION_PLUGINS["sm90"])(attention_model(text))


def test_an_attention_that_is_not_there() -> None:
    with pytest.raises(BuildError, match="the graph has no such attention"):
        LowerAttentionPass(["single.7.attention"], ATTENTION_PLUGINS["sm90"])(attention_model(attention_text()))


def test_blocks_without_a_kernel() -> None:
    text = attention_text(attention="sparse").replace("key_block = 64", "key_block = 128")
    assert plugins_of(lowered(text, "sm90"))[-1] == "block_sparse_attention"
    with pytest.raises(BuildError, match="blocks of 128 queries and 128 keys; kernels have 128 and 64"):
        lowered(text, "sm89")


def test_heads_without_a_kernel() -> None:
    text = attention_text().replace("float[64] q_norm", "float[32] q_norm")
    for old, new in (("2, 64", "4, 32"), ("[64]", "[32]"), ("{32}", "{16}"), ("[N,32]", "[N,16]")):
        text = text.replace(old, new)
    with pytest.raises(BuildError, match="heads of 32 channels; there are kernels for 64 and 128"):
        lowered(text)


def test_a_cut_stage_is_trusted_about_its_tables() -> None:
    """A later part gets the joint tables as inputs; that their text rows are the identity was seen in the whole."""
    text = attention_text().replace("joint_cos = Concat <axis = 0> (rope_cos, ones)\n", "")
    text = text.replace("joint_sin = Concat <axis = 0> (rope_sin, zeros)\n", "")
    text = text.replace("[N,32] rope_cos", "[S,32] joint_cos").replace("[N,32] rope_sin", "[S,32] joint_sin")
    with pytest.raises(BuildError, match="a rotary table of image and text is made by an input"):
        lowered(text)
    model = lowered(text, trusted_tables=["joint_cos", "joint_sin"])
    arrays = attention_inputs()
    whole = lowered(attention_text())
    (wanted,) = run(whole, **needed(whole, arrays))
    tail = np.ones((arrays["text"].shape[1], arrays["rope_cos"].shape[1]), np.float32)
    arrays["joint_cos"] = np.concatenate((arrays["rope_cos"], tail))
    arrays["joint_sin"] = np.concatenate((arrays["rope_sin"], 0 * tail))
    np.testing.assert_array_equal(run(model, **needed(model, arrays))[0], wanted)


def test_postconditions() -> None:
    model = attention_model(attention_text())
    with pytest.raises(PostconditionError, match=r"double\.0\.attention is still in the graph"):
        LowerAttentionPass(NAMES, ATTENTION_PLUGINS["sm90"]).ensures(model)
    LowerAttentionPass(NAMES, ATTENTION_PLUGINS["sm90"])(model)
    with pytest.raises(PostconditionError, match="has no function"):
        AddPluginFunctionsPass().ensures(model)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        *(("trt:sm90", True), ("trt:sm80+sm86", True), ("trt:sm121", False)),
        *(("rtx:sm89", False), ("cpu", False), ("cuda", False)),
    ],
)
def test_the_target_chooses(target: str, expected: bool) -> None:
    model = lower(attention_model(attention_text()), Target.parse(target), None, PluginAttentions(NAMES))
    assert bool(plugins_of(model)) == bool(model.functions) == expected
    assert ("Attention" in [node.op_type for node in model.graph]) != expected


def test_scales_of_its_own_mean_the_compilers_attention() -> None:
    eight_bit = EightBit(attentions={NAME: AttentionScales(0.1, 0.1, 0.1)})
    model = lower(attention_model(attention_text()), Target.parse("trt:sm90"), eight_bit, PluginAttentions(NAMES))
    assert plugins_of(model) == []
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 3


def test_architectures_with_different_plugins() -> None:
    with pytest.raises(BuildError, match="one graph cannot name the attention plugins") as caught:
        passes_for(Target.parse("trt:sm80+sm90"), EightBit(), PluginAttentions(NAMES))
    assert "fix: build a bundle for each" in str(caught.value)
