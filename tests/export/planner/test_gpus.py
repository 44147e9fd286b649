"""GPUs by name and attention kernels by GPU: what is found, what is refused, and that no entry slipped a unit."""

from __future__ import annotations

import pytest

from reelforge.export.lower import EightBit, PluginAttentions, passes_for
from reelforge.export.passes.lower_attention import LowerAttentionPass
from reelforge.export.planner.gpus import GPUS, find_gpu
from reelforge.export.planner.kernels import (
    COMPILERS_KERNELS,
    AttentionKernel,
    attention_rate,
    has_plugins,
    plugin_kernel,
)
from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.errors import RequestError
from reelforge.runtime.recipe import Precision, Target


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "4090", "NVIDIA GeForce RTX 4090"])
def test_names_are_found_however_they_are_written(name: str) -> None:
    assert find_gpu(name).name == "RTX 4090"


def test_a_short_name_means_the_common_variant() -> None:
    assert find_gpu("H100").name == "H100 SXM"
    assert find_gpu("a100").memory_bytes == 80 * 2**30


def test_an_unknown_gpu_is_refused_with_the_table_and_the_nearest_name() -> None:
    with pytest.raises(RequestError) as caught:
        find_gpu("RTX 4099")
    assert "the GPU 'RTX 4099' is not known" in str(caught.value)
    assert "H100 SXM" in caught.value.expected
    assert "RTX 4090" in caught.value.fix


def test_an_alien_gpu_gets_no_nearest_name() -> None:
    with pytest.raises(RequestError, match="leave --gpu out"):
        find_gpu("qwertyuiop")


def test_a_precision_that_a_gpu_lacks_is_refused() -> None:
    with pytest.raises(RequestError, match=r"A100 80GB \(sm80\) does not compute in fp8"):
        find_gpu("A100").rate(Precision.FP8)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_entry_agrees_with_its_architecture(gpu) -> None:
    facts = ARCHITECTURES[gpu.architecture]
    assert ("fp8" in gpu.rates) == facts.fp8
    assert ("bf16" in gpu.rates) == facts.bf16
    assert gpu.source
    # No unit slipped: 15-200 GB, 0.28-8 TB/s, and halving the bits never slows a GPU down.
    assert 15e9 <= gpu.memory_bytes < 200e9
    assert 2.8e11 <= gpu.bandwidth <= 8e12
    assert gpu.rates["fp32"] < gpu.rates["fp16"] < gpu.rates["int8"]
    assert gpu.rates.get("fp8", gpu.rates["int8"]) >= 1.9 * gpu.rates["fp16"]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_has_a_fused_attention_that_fp8_does_not_slow_down(gpu) -> None:
    fused, eight_bit = (attention_rate(kernel, gpu) for kernel in (AttentionKernel.FUSED, AttentionKernel.FUSED_FP8))
    assert fused.extrapolated
    assert eight_bit.rate > fused.rate > 0
    assert fused.rate < 1.1 * gpu.rates["fp16"]


def test_published_rates_are_taken_as_they_are() -> None:
    rate = attention_rate(AttentionKernel.SAGE_2, find_gpu("H100"))
    assert rate.rate == 882e12
    assert not rate.extrapolated


def test_a_relative_lends_its_fraction() -> None:
    rate = attention_rate(AttentionKernel.FLASH_2, find_gpu("L20"))
    assert rate.rate == pytest.approx(164 / 165.2 * 119.5e12)
    assert rate.extrapolated
    assert "RTX 4090" in rate.source


def test_a_kernel_without_figures_for_such_a_gpu_is_refused() -> None:
    with pytest.raises(RequestError, match="nobody has published how fast FlashAttention-3 is on the RTX 4090"):
        attention_rate(AttentionKernel.FLASH_3, find_gpu("RTX 4090"))


def test_our_plugin_is_measured_on_one_gpu_and_scaled_to_others() -> None:
    here, there = (attention_rate(AttentionKernel.PLUGIN, find_gpu(name)) for name in ("H100", "RTX 4090"))
    assert (here.rate, here.extrapolated) == (760e12, False)
    assert there.rate == pytest.approx(431e12 * 760 / 882)
    assert there.extrapolated


def test_plugins_are_tensorrt_s_where_no_scales_are_given() -> None:
    """A recipe with ``--attention fp8`` asks for the compiler's own attention (see ``export.lower``)."""
    assert plugin_kernel(Target.parse("trt:sm90")) is AttentionKernel.PLUGIN
    for target in ("rtx:sm89", "cuda", "cpu", "trt:sm75", "trt:sm121", "trt:sm80"):
        assert plugin_kernel(Target.parse(target)) is None
    assert has_plugins(Target.parse("trt:sm80")), "with 16-bit values, which nobody has timed"
    assert not has_plugins(Target.parse("trt:sm121"))
    assert COMPILERS_KERNELS[Precision.FP8] is AttentionKernel.FUSED_FP8
    assert Precision.FP32 not in COMPILERS_KERNELS


@pytest.mark.parametrize("name", ["trt:sm90", "trt:sm100", "trt:sm120", "trt:sm75", "rtx:sm89"])
def test_the_planner_s_plugins_are_the_graph_s(name: str) -> None:
    """Whether the passes of a target have plugins is not said twice differently."""
    target = Target.parse(name)
    passes = passes_for(target, EightBit(), PluginAttentions(("double.0.attention",)))
    assert any(isinstance(one, LowerAttentionPass) for one in passes) == has_plugins(target)
