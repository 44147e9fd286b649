"""All benchmarks of the project as data: what each shows, which file it makes, how long it takes and what it needs.

To add a benchmark, write a module with a command line below ``tools/bench`` and add it here; a test compares this list
with the modules and with the files under ``benchmarks/``. Nothing that measures is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass

PACKAGE = "reelforge.tools.bench"
DEVELOPMENT = ("torch", "onnx", "diffusers", "transformers")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: For ``reelforge bench``.
        module: Below ``PACKAGE``; its command line is the benchmark's.
        shows: One sentence.
        takes: How long, on the machine that the files name.
        needs: Disk, hardware and other environments, in words; empty if the development environment is all.
        output: The file it makes below ``benchmarks/``, or empty if it writes where it is told, or nothing.
        options: What its command line is given before the user's own options.
        imports: Packages without which it cannot start.
    """

    name: str
    module: str
    shows: str
    takes: str
    needs: str = ""
    output: str = ""
    options: tuple[str, ...] = ()
    imports: tuple[str, ...] = DEVELOPMENT


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "attention",
        "attention",
        "The attention kernels: numbers against float64, registers and memory, a roofline, times on an H100.",
        "20 min",
        "Triton and ptxas; section 5 shows what `attention-gpu` measured",
        "attention.md",
        ("-o", "benchmarks/attention.md"),
        ("triton", "torch"),
    ),
    Benchmark(
        "attention-gpu",
        "attention_measure",
        "Times and errors of the compiled attention kernels on the GPU at hand, which `attention` shows.",
        "10 min",
        "an NVIDIA GPU (sm_90), PyTorch with CUDA, and --kernels FOLDER",
        "attention_h100.json",
        ("-o", "benchmarks/attention_h100.json"),
        ("torch",),
    ),
    Benchmark(
        "check",
        "check",
        "Ratios that must not get worse, against benchmarks/baseline.json (`make bench-check`).",
        "3 min",
        output="baseline.json",
    ),
    Benchmark(
        "demo-model",
        "demo_model",
        "Whether the demonstration checkpoint draws what prompts say, on combinations it has never seen.",
        "5 min",
        output="demo_model.md",
    ),
    Benchmark(
        "dit-step",
        "dit_step_time",
        "Time of one denoising step of any checkpoint and its bundles beside diffusers.",
        "1 min and more",
        "--case NAME CHECKPOINT BUNDLE and -o FILE",
    ),
    Benchmark(
        "export",
        "export",
        "Seconds and memory of compiling 13 billion parameters, and full-width blocks against PyTorch.",
        "12 min",
        "20 GB of disk",
        "export.md",
        ("--work", "build/bench/export"),
    ),
    Benchmark(
        "first-run",
        "first_run",
        "What a newcomer waits for: clone, environment, `make demo`.",
        "4 min",
        "the package index",
        "first_run.md",
        imports=("av",),
    ),
    Benchmark(
        "full-size",
        "full_size",
        "Compiling 13 billion parameters to FP8 plans of TensorRT-RTX: seconds, memory, kernels.",
        "30 min",
        "60 GB of disk, TensorRT-RTX; no GPU",
        "full_size.md",
        ("--work", "build/bench/full_size"),
        (*DEVELOPMENT, "tensorrt_rtx"),
    ),
    Benchmark(
        "parity",
        "parity",
        "Largest differences of every stage, tiled decoding and whole pipelines from diffusers and transformers.",
        "2 min",
        output="parity.md",
    ),
    Benchmark(
        "peers-cpu",
        "peers_cpu",
        "A step beside diffusers, OpenVINO and ONNX Runtime on torch.onnx.export; that export at growing depth.",
        "20 min",
        "60 GB of disk, 14 GB of memory; OpenVINO through --openvino-python",
        "peers_cpu.md",
    ),
    Benchmark(
        "planner",
        "planner",
        "Predictions of `reelforge plan` beside published times, blocks on an H100 and real builds.",
        "1 min",
        "--bundle DIR for each real build; it shows what `planner-gpu` measured",
        "planner.md",
    ),
    Benchmark(
        "planner-gpu",
        "planner_gpu",
        "Times of kernels and blocks of our modules on the GPU at hand, which `planner` shows.",
        "2 min",
        "an NVIDIA GPU, PyTorch with CUDA",
        "planner_h100.json",
        ("-o", "benchmarks/planner_h100.json"),
        ("torch",),
    ),
    Benchmark(
        "quantisation",
        "quantisation",
        "INT8 and FP8: what methods cost in quality, beside other quantisers; the weight stream; INT8's speed.",
        "80 min",
        "20 GB of disk; ModelOpt through --peers-python",
        "quantisation.md",
        ("-o", "benchmarks/quantisation.md"),
    ),
    Benchmark(
        "quantisation-peers",
        "quantisation_peers",
        "Only the section of `quantisation` on other quantisers, on any fp32 bundle.",
        "10 min",
        "--bundle DIR and -o FILE; ModelOpt through --peers-python",
    ),
    Benchmark(
        "quantise-weights",
        "quantise_weights",
        "Only the section of `quantisation` on the weight stream.",
        "5 min",
        "20 GB of disk and -o FILE",
        imports=("torch", "ml_dtypes"),
    ),
    Benchmark(
        "runtime",
        "runtime",
        "Whole videos beside diffusers, overhead of the loop, imports, cold starts, memory over time.",
        "40 min",
        output="runtime.md",
        options=("-o", "benchmarks/runtime.md"),
    ),
    Benchmark(
        "service",
        "service",
        "The service: 64 clients beside one pipeline, kill -9, full disks and other faults, schemathesis, audit.",
        "15 min",
        "pip-audit through --pip-audit; the full disk needs the right to mount",
        "service.md",
        ("-o", "benchmarks/service.md"),
        ("fastapi", "schemathesis", "onnxruntime"),
    ),
    Benchmark(
        "soak",
        "runtime_soak",
        "Hundreds of mixed requests on one pipeline: do memory, files or threads grow?",
        "2 min per 100",
        "a bundle",
        imports=("onnxruntime",),
    ),
    Benchmark(
        "sparse-attention",
        "sparse_attention",
        "What leaving keys out costs the demonstration model in PSNR and accuracy.",
        "hours",
        output="sparse_attention.md",
        options=("-o", "benchmarks/sparse_attention.md"),
    ),
    Benchmark(
        "step-cache",
        "step_cache",
        "Steps that caches save, against distance from the full run and against fewer steps.",
        "20 min",
        output="step_cache.md",
        options=("--work", "build/bench/step_cache"),
    ),
)

PARTS: dict[str, str] = {
    "calibration_data": "records what quantisers calibrate on; `quantisation` calls it",
    "openvino_child": "a process of `peers-cpu` in OpenVINO's environment",
    "our_quantiser_child": "a process of `quantisation`",
    "peer_quantiser": "a process of `quantisation` in the environment of other quantisers",
    "peers_child": "a process of `peers-cpu`",
    "peers_export_child": "a process of `peers-cpu`",
    "quantise_weights_child": "a process of `quantise-weights`",
    "runtime_child": "a process of `runtime`",
    "service_clients": "a process of `service`",
}
"""Modules with a command line that are no benchmarks, and whose they are."""


def find(name: str) -> Benchmark | None:
    """Return the benchmark called ``name``."""
    return next((benchmark for benchmark in BENCHMARKS if benchmark.name == name), None)
