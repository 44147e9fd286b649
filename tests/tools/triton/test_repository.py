"""What is written, held against Triton's schema; and that nothing is left of what could not be."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest

from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.manifest import PlanEntry, ProfileEntry, StageEntry, TensorInfo
from reelforge.runtime.recipe import Backend, Target
from reelforge.runtime.step_cache.settings import PARTED_STAGES, Method, Reuse, StepCache
from reelforge.tools import console
from reelforge.tools.main import cli
from reelforge.tools.triton import repository as module
from reelforge.tools.triton.layout import LOOP_STAGES, decide_layout
from reelforge.tools.triton.repository import ExportRequest, export_repository
from tests.runtime.fake_bundle import CACHED
from tests.tools.triton.triton_schema import data_type, read_repository, schema


def export(bundle: Path, output: Path, **options: object) -> module.Exported:
    return export_repository(Bundle.open(bundle), ExportRequest(output, **options))  # type: ignore[arg-type]


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        console.run(cli, ["export-triton", *(os.fspath(argument) for argument in arguments)])
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_every_stage_is_a_model_with_the_manifests_tensors(whole_bundle: Path, repository: Path) -> None:
    manifest = Bundle.open(whole_bundle).manifest
    configs = read_repository(repository)
    assert set(configs) == {"reelforge", *(f"reelforge_{stage}" for stage in CACHED)}
    for stage in manifest.stages:
        config = configs[f"reelforge_{stage.name}"]
        assert config.platform == "onnxruntime_onnx"
        assert config.instance_group[0].kind == schema().ModelInstanceGroup.KIND_CPU
        for infos, tensors in ((stage.inputs, config.input), (stage.outputs, config.output)):
            stated = [TensorInfo(one.name, data_type(one), tuple(one.dims)) for one in tensors]
            sizes = [[size if isinstance(size, int) else -1 for size in info.shape] or [1] for info in infos]
            assert stated == [
                TensorInfo(info.name, info.dtype, tuple(size)) for info, size in zip(infos, sizes, strict=True)
            ]


def test_a_models_folder_is_complete_in_itself(whole_bundle: Path, repository: Path) -> None:
    """A session finds its weights, and they are the bundle's own bytes: linked, not copied."""
    for stage in Bundle.open(whole_bundle).manifest.stages:
        folder = repository / f"reelforge_{stage.name}" / "1"
        onnxruntime.InferenceSession(folder / stage.graph)
        for path in {stage.graph, *(weight.file for weight in stage.weights)}:
            assert (folder / path).samefile(whole_bundle / path)
            assert not (folder / path).is_symlink()


def test_the_pipelines_model(repository: Path) -> None:
    config = read_repository(repository)["reelforge"]
    assert config.backend == "python"
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["prompt"]
    models = json.loads(config.parameters["models"].string_value)
    assert models == {stage: f"reelforge_{stage}" for stage in CACHED}
    assert config.parameters["inside"].string_value == ""
    folder = repository / "reelforge" / "1"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"model.py", "bundle/manifest.json", "bundle/tokenizers/llm.json", "bundle/tokenizers/clip.json"}


def test_what_is_wanted_inside(whole_bundle: Path, tmp_path: Path) -> None:
    """The loop's stages stay together, and their files come with the pipeline."""
    done = export(whole_bundle, tmp_path / "models", inside=("dit",), instances=3, memory_budget="2GiB", name="hv")
    assert set(done.layout.inside) == set(LOOP_STAGES) & set(CACHED)
    assert done.layout.reasons["guidance"] == "it works on what 'dit' leaves where it computes"
    configs = read_repository(tmp_path / "models")
    assert set(configs) == {"hv", *(f"hv_{stage}" for stage in CACHED if stage not in LOOP_STAGES)}
    assert configs["hv"].instance_group[0].count == 3
    assert configs["hv"].parameters["memory_budget"].string_value == "2GiB"
    assert (tmp_path / "models/hv/1/bundle/dit.onnx").samefile(whole_bundle / "dit.onnx")


def test_everything_that_the_loop_calls_stays_together(bundle_copy: Path) -> None:
    """For TensorRT, also head, body and tail, which have no tensor of rank 0 themselves; and whatever a cache asks."""
    asked = {stage for method in Method for reuse in Reuse for stage in StepCache(method, 0.1, reuse=reuse).stages}
    assert set(LOOP_STAGES) == {"dit", "guidance"} | asked
    bundle = with_plans(Bundle.open(bundle_copy), Backend.TRT)
    dit = bundle.stage("dit")
    without = tuple(info for info in dit.inputs if info.shape)
    plans = tuple(replace(plan, inputs=without) for plan in dit.plans)
    parts = [replace(dit, name=name, inputs=without, plans=plans) for name in PARTED_STAGES]
    layout = decide_layout(replace(bundle.manifest, stages=(*bundle.manifest.stages, *parts)))
    assert set(PARTED_STAGES) <= set(layout.inside)
    assert layout.reasons["dit_body"] == "it works on what 'dit' leaves where it computes"


def test_copies_where_they_are_wanted_or_links_are_impossible(
    whole_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = export(whole_bundle, tmp_path / "copied", copy=True)
    assert done.linked_bytes == 0
    assert done.copied_bytes > 0

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    again = export(whole_bundle, tmp_path / "elsewhere")
    assert again.copied_bytes == done.copied_bytes
    graph = tmp_path / "elsewhere/reelforge_llm/1/weights/llm.safetensors"
    assert graph.read_bytes() == (whole_bundle / "weights/llm.safetensors").read_bytes()


Tensors = tuple[TensorInfo, ...]


def _plan(part: int, parts: int, group: tuple[str, ...], inputs: Tensors, outputs: Tensors, name: str) -> PlanEntry:
    sizes = {"batch": (1, 1, 1)}
    path = f"plans/{name}.{part}.{'+'.join(group)}.plan"
    profiles = (ProfileEntry("small", sizes, 1), ProfileEntry("large", sizes, 2))
    return PlanEntry(path, f"{path}.json", group, part, parts, inputs, outputs, profiles, 1, "tensorrt 11")


def with_plans(bundle: Bundle, backend: Backend) -> Bundle:
    """All stages as one plan, but ``llm`` in two parts; for two groups of architectures."""
    stages: list[StageEntry] = []
    for stage in bundle.manifest.stages:
        plans = []
        for group in (("sm80", "sm86"), ("sm90",)):
            passed = (TensorInfo("passed", "bfloat16", (1, "tokens", 8)),)
            if stage.name == "llm":
                plans.append(_plan(0, 2, group, stage.inputs, passed, stage.name))
                plans.append(_plan(1, 2, group, passed, stage.outputs, stage.name))
            else:
                plans.append(_plan(0, 1, group, stage.inputs, stage.outputs, stage.name))
        stages.append(replace(stage, plans=tuple(plans)))
    for path in {plan.path for stage in stages for plan in stage.plans}:
        (bundle.path / path).parent.mkdir(exist_ok=True)
        (bundle.path / path).write_bytes(path.encode())
    manifest = replace(bundle.manifest, stages=tuple(stages), target=Target(backend, ("sm80", "sm86", "sm90")))
    return Bundle(bundle.path, manifest)


def test_plans_of_tensorrt(bundle_copy: Path, tmp_path: Path) -> None:
    bundle = with_plans(Bundle.open(bundle_copy), Backend.TRT)
    done = export_repository(bundle, ExportRequest(tmp_path / "models"))
    assert done.layout.reasons == {"dit": "Triton's TensorRT backend takes no tensors of rank 0 (sigma_step)"}
    configs = read_repository(tmp_path / "models")
    clip = configs["reelforge_clip"]
    assert clip.platform == "tensorrt_plan"
    assert dict(clip.cc_model_filenames) == {
        "8.0": "clip.0.sm80+sm86.plan", "8.6": "clip.0.sm80+sm86.plan", "9.0": "clip.0.sm90.plan",
    }  # fmt: skip
    assert list(clip.instance_group[0].profile) == ["0", "1"]
    assert clip.instance_group[0].kind == schema().ModelInstanceGroup.KIND_GPU
    for file in (*clip.cc_model_filenames.values(), clip.default_model_filename):
        assert (tmp_path / "models/reelforge_clip/1" / file).is_file()
    whole = configs["reelforge_llm"]
    assert whole.platform == "ensemble"
    assert [step.model_name for step in whole.ensemble_scheduling.step] == ["reelforge_llm_0", "reelforge_llm_1"]
    assert schema().DataType.Name(configs["reelforge_llm_0"].output[0].data_type) == "TYPE_BF16"
    pipeline = configs["reelforge"]
    assert pipeline.instance_group[0].kind == schema().ModelInstanceGroup.KIND_GPU, "dit computes in it"
    assert (tmp_path / "models/reelforge/1/bundle/plans/dit.0.sm90.plan").is_file()


def test_plans_of_tensorrt_rtx_run_inside(bundle_copy: Path) -> None:
    bundle = with_plans(Bundle.open(bundle_copy), Backend.RTX)
    layout = decide_layout(bundle.manifest)
    assert layout.models == ()
    assert set(layout.reasons.values()) == {"Triton has no backend for plans of TensorRT-RTX"}


def test_plans_cut_differently_run_inside(bundle_copy: Path) -> None:
    bundle = with_plans(Bundle.open(bundle_copy), Backend.TRT)
    stage = bundle.stage("llm")
    (one,) = (plan for plan in bundle.stage("clip").plans if plan.architectures == ("sm90",))
    other = replace(one, inputs=stage.inputs, outputs=stage.outputs)
    stage = replace(stage, plans=(*(plan for plan in stage.plans if plan.architectures != ("sm90",)), other))
    stages = tuple(stage if entry.name == "llm" else entry for entry in bundle.manifest.stages)
    layout = decide_layout(replace(bundle.manifest, stages=stages))
    assert layout.reasons["llm"] == "its plans are cut differently for different architectures"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../x"}, "the model's name cannot be used"),
        ({"inside": ("dit", "unet")}, "--inside names stages that the bundle does not have"),
        ({"memory_budget": "much"}, "memory"),
    ],
)
def test_options_that_cannot_be(whole_bundle: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        export(whole_bundle, tmp_path / "models", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_stays_as_it_is(whole_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(BuildError, match="exists"):
        export(whole_bundle, tmp_path / "models")
    assert [path.name for path in tmp_path.rglob("*")] == ["models"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_nothing_is_left_of_a_failure(
    whole_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    copied: list[Path] = []

    def fail_at_the_third(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) == 3:
            raise OSError(number, os.strerror(number), str(target))
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(module, "copy_with_holes", fail_at_the_third)
    with pytest.raises(BuildError) as caught:
        export(whole_bundle, tmp_path / "models", copy=True)
    assert "cannot be written" in caught.value.where
    assert ("bytes free" in str(caught.value)) == (number == errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def test_the_command(whole_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(whole_bundle, "-o", tmp_path / "models", "--inside", "vae_decoder", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["inside"] == {"vae_decoder": "as asked"}
    assert sorted(value["models"]) == sorted(read_repository(tmp_path / "models"))
    assert run(whole_bundle, "-o", tmp_path / "more", "--inside", "all") == 0
    said = capsys.readouterr().err
    assert "stage 'llm' runs inside 'reelforge': as asked" in said
    assert "more: reelforge (" in said
    assert run(whole_bundle, "-o", tmp_path / "more") == 5
