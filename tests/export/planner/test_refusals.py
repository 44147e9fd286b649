"""Every refusal's message, and that its advice is sound: what it suggests is planned again and fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reelforge.export.planner.gpus import Gpu, find_gpu
from reelforge.export.planner.plan import Model, Plan, PlanOptions, make_plan
from reelforge.export.planner.refusals import Refusal, check_gpu, find_refusals, require_fit
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.recipe import Precision, Recipe, Target, VideoShape
from tests.export.planner.models import HD, MIDDLE, SMALL, model, recipe

RTX = Target.parse("rtx:sm89+sm120")


def refused(
    what: Recipe, gpu: Gpu, planned: Model | None = None, **options: object
) -> tuple[Plan, tuple[Refusal, ...]]:
    planned = planned or model()
    plan = make_plan(planned, RTX, what, PlanOptions(gpu=gpu, **options))  # type: ignore[arg-type]
    return plan, find_refusals(planned, plan)


def card(gigabytes: float, name: str = "RTX 4090") -> Gpu:
    return replace(find_gpu(name), memory_bytes=int(gigabytes * 1e9))


def test_what_fits_is_not_refused() -> None:
    _, refusals = refused(recipe(HD, dit=Precision.FP8), find_gpu("RTX 4090"))
    assert refusals == ()
    require_fit(refusals)


def test_a_loop_that_does_not_fit_is_refused_with_what_would() -> None:
    _, (refusal,) = refused(recipe(HD, MIDDLE, SMALL), find_gpu("RTX 4090"))
    assert refusal.where == "the loop does not fit the RTX 4090 at 720x1280x129, 544x960x129."
    assert refusal.received == "31.7 GB at 720x1280x129: dit with 18.1 GB weights and 12.4 GB activations"
    assert refusal.expected == "at most 25.8 GB"
    assert refusal.fixes == (
        "use --precision dit=fp8",
        "use --shapes 480x832x81",
        "use a GPU with more memory, such as the RTX 5090",
    )


def test_advice_holds_when_it_is_followed() -> None:
    gpu = find_gpu("RTX 4090")
    for what, options in (
        (recipe(HD, dit=Precision.FP8), {}),
        (recipe(SMALL), {}),
    ):
        assert refused(what, gpu, **options)[1] == ()


def test_the_message_is_an_error_with_all_four_parts() -> None:
    _, refusals = refused(recipe(HD), find_gpu("RTX 4090"))
    with pytest.raises(BuildError) as caught:
        require_fit(refusals)
    assert "BuildError: the loop does not fit the RTX 4090 at 720x1280x129." in str(caught.value)
    assert "fix: use --precision dit=fp8; or " in str(caught.value)


def test_a_text_encoder_that_does_not_fit_is_advised_8_bits() -> None:
    refusals = refused(recipe(SMALL, dit=Precision.FP8), card(14))[1]
    assert [refusal.where for refusal in refusals] == [
        "the text does not fit the RTX 4090 at 480x832x81, 480x832x1.",
    ]
    assert refusals[0].fixes[0] == "use --precision llm=fp8"


def test_architectures_without_fp8_are_advised_int8() -> None:
    target = Target.parse("rtx:sm86+sm89")
    planned = model()
    plan = make_plan(planned, target, recipe(HD), PlanOptions(gpu=find_gpu("RTX 3090")))
    (refusal,) = find_refusals(planned, plan)
    assert refusal.fixes[0] == "use --precision dit=int8"


def test_a_stage_without_8_bit_layers_is_advised_half_precision() -> None:
    refusals = refused(recipe(SMALL, dit=Precision.FP8, llm=Precision.FP8, modulation=Precision.FP32), card(14))[1]
    assert refusals[0].where.startswith("the conditioning does not fit")
    assert refusals[0].fixes[0] == "use --precision modulation=fp16"


def test_when_no_asked_shape_fits_fewer_frames_are_advised() -> None:
    refusals = refused(recipe(HD, dit=Precision.FP8, llm=Precision.FP8), card(16))[1]
    assert "use --shapes 720x1280x65" in refusals[0].fixes


def test_when_fewer_frames_do_not_fit_smaller_pictures_are_advised() -> None:
    large, small = VideoShape(1440, 2560, 5), VideoShape(720, 1280, 5)
    precisions = {"dit": Precision.FP8, "llm": Precision.FP8}
    needs = [make_plan(model(), RTX, recipe(shape, **precisions)).buckets[0].memory[2] for shape in (large, small)]
    between = sum(memory.total_bytes for memory in needs) / 2
    refusals = refused(recipe(large, **precisions), card(between / 1e9))[1]
    loop = next(refusal for refusal in refusals if "loop" in refusal.where)
    assert f"use --shapes {small}" in loop.fixes


def test_a_decoder_that_does_not_fit_is_advised_smaller_tiles() -> None:
    planned = model()
    tiling = replace(planned.spec.tiling, frame_window=4, frame_stride=3)
    planned = replace(planned, tilings={"--numerics diffusers": tiling})
    small = replace(planned.spec.dit, double_blocks=1, single_blocks=1)
    llm = replace(planned.spec.llm, used_layers=1)
    spec = replace(planned.spec, dit=small, llm=llm)
    planned = replace(planned, spec=spec, stages=planned.family.stages(spec, 1))
    refusals = refused(recipe(SMALL), card(5), planned)[1]
    (decode,) = [refusal for refusal in refusals if "decode" in refusal.where]
    assert "decode in smaller tiles with --numerics diffusers" in decode.fixes


def test_a_hopeless_case_says_so() -> None:
    refusals = refused(recipe(HD, dit=Precision.FP8), card(1, "RTX PRO 6000"))[1]
    assert refusals
    lonely = Refusal("it does not fit.", "much", "little", ())
    with pytest.raises(BuildError, match="no single change that the planner tries is enough"):
        require_fit((lonely,))


def test_further_refusals_are_counted() -> None:
    refusals = refused(recipe(HD), card(5))[1]
    with pytest.raises(BuildError, match=rf"\(and {len(refusals) - 1} more that does not fit: see reelforge plan\)"):
        require_fit(refusals)


def test_a_build_that_is_cut_too_little_is_refused_with_the_number_of_parts() -> None:
    options = PlanOptions(parts={"dit": 1}, host_bytes=int(24e9))
    plan = make_plan(model(), RTX, recipe(SMALL), options)
    (refusal,) = find_refusals(model(), plan)
    assert refusal.where == "compiling dit in 1 part does not fit this machine."
    assert refusal.received == "34.6 GB of memory"
    assert refusal.expected == "at most 24.0 GB"
    assert refusal.fixes == (
        "cut dit into 3 parts with --builder-memory 16.8",
        "build on a machine with 34.6 GB of memory",
    )


def test_a_build_that_no_cut_makes_fit_is_refused_without_one() -> None:
    plan = make_plan(model(), RTX, recipe(SMALL), PlanOptions(host_bytes=int(0.6e9)))
    refusals = find_refusals(model(), plan)
    vae = next(refusal for refusal in refusals if "vae_decoder" in refusal.where)
    assert vae.fixes == ("build on a machine with 0.8 GB of memory",)


def test_a_calibration_that_does_not_fit_is_refused() -> None:
    options = PlanOptions(host_bytes=int(8e9), calibration_bytes=int(11e9))
    plan = make_plan(model(), RTX, recipe(SMALL, dit=Precision.INT8), options)
    refusal = find_refusals(model(), plan)[0]
    assert refusal.where == "calibration does not fit this machine's memory."
    assert refusal.fixes == ("use --calibration-memory 5", "give --scales")


def test_the_cpu_has_no_gpu() -> None:
    with pytest.raises(RequestError, match="target cpu does not run on the RTX 4090") as caught:
        check_gpu(Target.parse("cpu"), find_gpu("RTX 4090"))
    assert caught.value.fix == "use --target rtx:sm89, or leave --gpu out"


def test_a_gpu_that_the_target_has_no_plan_for_is_refused() -> None:
    with pytest.raises(RequestError, match="target rtx:sm120 has no plan for the RTX 4090, which is sm89"):
        check_gpu(Target.parse("rtx:sm120"), find_gpu("RTX 4090"))
    with pytest.raises(RequestError, match="use --target trt:sm90"):
        check_gpu(RTX, find_gpu("H100"))


def test_a_backend_that_compiles_when_it_loads_takes_any_gpu() -> None:
    check_gpu(Target.parse("cuda"), find_gpu("H100"))
    check_gpu(RTX, find_gpu("RTX 5090"))
