"""Real TensorRT-RTX plans of the demonstration checkpoint, compiled without a GPU: complete, cached, identical.

Scales are invented: what is tested is which kernels there are and what is compiled again, not pictures. Nothing here
runs a plan.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from reelforge.calibration.scale_file import read_scale_file, write_scale_file
from reelforge.export.build import build_bundle
from reelforge.export.build_request import BuildEvents, BuildRequest, CalibrationRequest, CompilationRequest
from reelforge.runtime.bundle.open import Bundle, Check
from reelforge.runtime.codec import from_json
from reelforge.runtime.errors import BuildError, ReelforgeError, RequestError
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.plan_file import check_header
from reelforge.runtime.receipt import Receipt
from reelforge.runtime.recipe import EVERY_STAGE, Backend, Precision, Target, VideoShape
from reelforge.tools.bench.invented_scales import write_invented_scales
from reelforge.tools.verify import verify
from tests.bundles import TraceMemory, locked, session_folder

CHECKPOINT = Path("demo/checkpoint").absolute()
STAGES = (
    "llm", "clip", "refiner", "modulation", "dit", "guidance", "step_change", "step_reuse", "input_change",
    "vae_decoder",
)  # fmt: skip
NUMBERED_BY_CHANCE = ("vae_decoder", "modulation")  # the first often, the second seen once, beside other work
BLOCK_GEMMS, ATTENTIONS = 2 * 12 + 4 * 6, 6
"""Of ``dit``: two double blocks of two streams with six layers, four single blocks of six; one attention each."""


@dataclass
class Builds:
    """Builds of the demonstration checkpoint in one folder with one cache."""

    folder: Path

    def request(self, name: str, target: str, precision: Precision, **changes: object) -> BuildRequest:
        request = BuildRequest(
            checkpoint=CHECKPOINT,
            output=self.folder / name,
            target=Target.parse(target),
            precision={EVERY_STAGE: precision},
            shapes=(VideoShape(64, 64, 9),),
            compilation=CompilationRequest(cache=self.folder / "cache"),
        )
        return replace(request, **changes)  # type: ignore[arg-type]

    def scaled(self, request: BuildRequest) -> BuildRequest:
        path = write_invented_scales(request, self.folder / f"{request.output.name}.safetensors")
        return replace(request, calibration=CalibrationRequest(scales=path, gated=False))

    def run(self, request: BuildRequest) -> tuple[Manifest, list[str]]:
        """Build, and also return the names of what was compiled."""
        compiled: list[str] = []
        manifest = build_bundle(request, BuildEvents(plan=lambda name, _pid: compiled.append(name)))
        return manifest, compiled


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """One folder for all workers, so that what one compiles no other does."""
    folder = session_folder(tmp_path_factory) / "demo_plans"
    folder.mkdir(exist_ok=True)
    return Builds(folder)


@pytest.fixture(scope="module")
def fp8(builds: Builds, trace_memory: TraceMemory) -> BuildRequest:
    """A finished build in FP8 for two architectures, attention included."""
    request = builds.request("fp8", "rtx:sm89+sm120", Precision.FP8, attention=Precision.FP8)
    with locked(request.output), trace_memory.used():
        scaled = builds.scaled(request)
        if not request.output.exists():
            _, compiled = builds.run(scaled)
            assert compiled == list(STAGES)
    return scaled


def receipt(bundle: Path, manifest: Manifest, stage: str, part: int = 0) -> Receipt:
    entry = manifest.stage(stage)
    assert entry is not None
    return from_json(Receipt, json.loads((bundle / entry.plans[part].receipt).read_text()))


def named(made: Receipt, kind: str, dtype: str) -> set[str]:
    """The graph's layers that kernels of ``kind`` read in ``dtype``."""
    return {node for layer in made.of_kind(kind) if layer.inputs[0] == dtype for node in layer.nodes}


@pytest.mark.usefixtures("remembered_traces")
def test_fp8_is_complete(fp8: BuildRequest) -> None:
    bundle = Bundle.open(fp8.output, Check.FULL)
    made = receipt(fp8.output, bundle.manifest, "dit")
    blocks = {name for name in named(made, "gemm", "FP8") if name.startswith(("double.", "single."))}
    assert len(blocks) == BLOCK_GEMMS
    assert made.precisions("attention") == {"FP8": ATTENTIONS}
    for stage in ("llm", "clip", "refiner"):
        assert set(receipt(fp8.output, bundle.manifest, stage).precisions("attention")) == {"BFloat16"}
    convolutions = receipt(fp8.output, bundle.manifest, "vae_decoder").precisions("convolution")
    assert set(convolutions) == {"Half"}
    assert bundle.manifest.recipe.precision["vae_decoder"] is Precision.FP16
    for entry in bundle.manifest.stages:
        (plan,) = entry.plans
        assert plan.architectures == ("sm89", "sm120")
        assert (plan.part, plan.parts) == (0, 1)
        version = plan.backend.removeprefix("tensorrt_rtx ")
        for name in plan.architectures:
            check_header(fp8.output / plan.path, backend=Backend.RTX, version=version, architecture=name)
        if entry.name not in ("guidance", "step_change", "step_reuse"):  # one kernel needs nothing beside its tensors
            assert all(profile.activation_bytes > 0 for profile in plan.profiles)
    dit = bundle.stage("dit").plans[0]
    assert [profile.name for profile in dit.profiles] == ["64x64x9"]  # one frame has 16 tokens, too few for FP8


@pytest.mark.usefixtures("remembered_traces")
def test_int8_on_another_architecture(builds: Builds) -> None:
    request = builds.scaled(builds.request("int8", "rtx:sm86", Precision.INT8))
    manifest, _ = builds.run(request)
    made = receipt(request.output, manifest, "dit")
    blocks = named(made, "gemm", "Int8")
    assert len(blocks) == BLOCK_GEMMS, Counter(layer.inputs[0] for layer in made.of_kind("gemm"))
    assert made.precisions("attention") == {"BFloat16": ATTENTIONS}
    assert [profile.name for profile in manifest.stage("dit").plans[0].profiles] == ["64x64x9", "64x64x1"]  # type: ignore[union-attr]


@pytest.mark.usefixtures("remembered_traces")
def test_what_is_compiled_again(builds: Builds, fp8: BuildRequest, tmp_path: Path) -> None:
    """Nothing for another prompt template; ``dit`` for another scale; and a plan compiled anew has the same bytes."""
    template = tmp_path / "template.json"
    shutil.copy(CHECKPOINT / "prompt_template.json", template)
    said = json.loads(template.read_text())
    said["template"] = said["template"].replace("{}", "{} ")
    template.write_text(json.dumps(said))
    manifest, compiled = builds.run(replace(fp8, output=builds.folder / "template", prompt_template=template))
    assert compiled == []
    assert manifest.prompt_template.text != Bundle.open(fp8.output, Check.SIZES).manifest.prompt_template.text

    scales = fp8.calibration.scales
    assert scales is not None
    known = read_scale_file(scales)
    name = "dit.single.1.fc1.activation"
    other = tmp_path / "other.safetensors"
    write_scale_file(other, known.provenance, {**known.tensors, name: known.tensors[name] * np.float32(1.5)})
    changed = replace(fp8, output=builds.folder / "scale", calibration=replace(fp8.calibration, scales=other))
    assert builds.run(changed)[1] == ["dit"]

    without = CompilationRequest(cache=None)
    again, compiled = builds.run(replace(fp8, output=builds.folder / "again", compilation=without))
    assert compiled == list(STAGES)
    first = Bundle.open(fp8.output, Check.SIZES).manifest
    for entry in again.stages:
        path = entry.plans[0].path
        plans = [(folder / path).read_bytes() for folder in (builds.folder / "again", fp8.output)]
        if entry.name not in NUMBERED_BY_CHANCE:
            assert plans[0] == plans[1], path
            continue
        # The compiler numbers a few of these stages' kernels in the order in which its threads come to them.
        made = receipt(builds.folder / "again", again, entry.name), receipt(fp8.output, first, entry.name)
        kinds = [[(layer.kind, layer.inputs, layer.outputs, layer.nodes) for layer in one.layers] for one in made]
        assert sorted(kinds[0]) == sorted(kinds[1])
        assert abs(len(plans[0]) - len(plans[1])) < 1024, "numbers are written with a length of their own"
    assert again.content_digest == first.content_digest


@pytest.mark.usefixtures("remembered_traces")
def test_a_stage_that_is_too_large_is_compiled_in_parts(builds: Builds, fp8: BuildRequest) -> None:
    """Every layer is in one of the parts, in the recipe's format, and the parts' tensors fit together."""
    small = CompilationRequest(cache=builds.folder / "cache", memory_bytes=301_500_000)
    request = replace(fp8, output=builds.folder / "parts", compilation=small)
    manifest, _ = builds.run(request)
    entry = manifest.stage("dit")
    assert entry is not None
    assert len(entry.plans) >= 2
    assert [plan.part for plan in entry.plans] == list(range(entry.plans[0].parts))
    made = [receipt(request.output, manifest, "dit", part) for part in range(len(entry.plans))]
    blocks = {node for one in made for node in named(one, "gemm", "FP8") if node.startswith(("double.", "single."))}
    assert len(blocks) == BLOCK_GEMMS
    assert sum(one.precisions("attention").get("FP8", 0) for one in made) == ATTENTIONS
    rows = manifest.stage("modulation")  # its blocks collect rows of one output
    assert rows is not None
    assert len(rows.plans) >= 3
    for stage in (entry, rows):
        known = {info.name: info for info in stage.inputs}
        for plan in stage.plans:
            assert all(known[info.name] == info for info in plan.inputs)
            known |= {info.name: info for info in plan.outputs}
        assert all(known[info.name] == info for info in stage.outputs)
    Bundle.open(request.output, Check.FULL)
    assert not list(request.output.glob("compiled*"))


def test_weights_are_verified_and_numbers_are_not(fp8: BuildRequest) -> None:
    result = CliRunner().invoke(verify, [str(fp8.output), "--checkpoint", str(CHECKPOINT)])
    assert result.exit_code == 0, result.output
    assert "weights equal the checkpoint's; engines for rtx:sm89+sm120 do not run here" in result.output


# Refusals.


@pytest.mark.parametrize(
    ("target", "changes", "error", "parts"),
    [
        ("rtx:sm86", {}, RequestError, ["sm86 cannot compute in fp8", "sm89"]),
        ("rtx:sm89", {"high_precision": Precision.FP32}, RequestError, ["fp32", "no fp32 attention", "use bf16"]),
        ("rtx:sm89", {"verify": True}, RequestError, ["cannot be verified", "--target rtx:sm89", "leave --verify out"]),
        ("trt:sm90", {}, BuildError, ["TensorRT compiles for the GPU", "sm90", "fix: "]),
        ("rtx:sm89", {"shapes": (VideoShape(16, 16, 1),), "attention": Precision.FP8}, RequestError, ["too small"]),
    ],
)
def test_what_cannot_be_built_is_said_before_any_work(
    builds: Builds,
    target: str,
    changes: dict[str, object],
    error: type[ReelforgeError],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = builds.request("refused", target, Precision.FP8, **changes)
    if target.startswith("trt"):
        monkeypatch.setattr("importlib.metadata.version", lambda _name: "10.14.0")
    with pytest.raises(error) as caught:
        builds.run(request)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert not request.output.exists()


@pytest.mark.usefixtures("remembered_traces")
def test_a_failing_compiler_leaves_nothing(builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BuildError("the compiler of stage 'clip' crashed.", received="its last words")

    monkeypatch.setattr("reelforge.export.plans.compile_plan", fail)
    request = builds.request("b", "rtx:sm89", Precision.BF16, output=tmp_path / "b", stages=("clip",))
    with pytest.raises(BuildError, match="its last words"):
        builds.run(replace(request, compilation=CompilationRequest()))
    assert list(tmp_path.iterdir()) == []
