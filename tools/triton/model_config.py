"""The ``config.pbtxt`` of each model, as data for ``text_format``: names, types and dimensions from the manifest.

Every model has ``max_batch_size`` 0: the graphs' own first axes are not requests. A tensor of rank 0 is stated as
``[1]``, from which Triton's ONNX Runtime backend makes a scalar. Field names are those of Triton's
``model_config.proto``. The module does not know where files go.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from reelforge.runtime.architectures import ARCHITECTURES
from reelforge.runtime.manifest import PlanEntry, StageEntry, TensorInfo
from reelforge.runtime.recipe import Backend
from reelforge.tools.triton.text_format import Value, Word

Config = dict[str, Value]

_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "string": "TYPE_STRING",
}

# The pipeline's tensors: name -> type. All but the prompt may be left out.
REQUEST_TENSORS = {
    "prompt": "string",
    "negative_prompt": "string",
    "height": "int64",
    "width": "int64",
    "frames": "int64",
    "steps": "int64",
    "seed": "int64",
    "guidance": "float64",
    "cfg_scale": "float64",
    "shift": "float64",
    "step_cache": "string",
}
VIDEO, PIXELS, NOTICES = "video", "pixels", "notices"

_LARGE_RESULT = "vae_decoder"


def graph_config(name: str, stage: StageEntry, backend: Backend) -> Config:
    """Return the configuration of a stage that ONNX Runtime runs from its graph."""
    kind = "KIND_CPU" if backend is Backend.CPU else "KIND_GPU"
    config = _config(name, "onnxruntime_onnx", stage.inputs, stage.outputs, stage.graph)
    config["instance_group"] = [{"count": 1, "kind": Word(kind)}]
    # A stage that waits keeps no activations. The decoder's frames would lie in an arena and keep its block: the
    # runtime copies them and gives it back, which cannot be asked of Triton's backend.
    shrinks = {"memory.enable_memory_arena_shrinkage": "cpu:0"}
    arena = {"enable_mem_arena": "0"} if stage.name == _LARGE_RESULT else shrinks
    return config | _parameters(arena if backend is Backend.CPU else {})


def plan_config(name: str, plans: Sequence[PlanEntry], file_names: Mapping[str, str]) -> Config:
    """Return the configuration of a TensorRT plan, or of one part of a stage.

    Args:
        name: Of the model.
        plans: The part's plan for each group of architectures; their tensors and profiles are equal.
        file_names: Architecture -> the file of its plan.
    """
    config = _config(name, "tensorrt_plan", plans[0].inputs, plans[0].outputs, next(iter(file_names.values())))
    profiles = [str(index) for index in range(len(plans[0].profiles))]
    config["instance_group"] = [{"count": 1, "kind": Word("KIND_GPU"), "profile": profiles}]
    capabilities = {key: ".".join(map(str, ARCHITECTURES[key].capability)) for key in file_names}
    config["cc_model_filenames"] = [{"key": capabilities[key], "value": file} for key, file in file_names.items()]
    return config


def ensemble_config(name: str, stage: StageEntry, parts: Mapping[str, Sequence[PlanEntry]]) -> Config:
    """Return the configuration of a stage whose parts are models: what passes between them stays on the device.

    Args:
        name: Of the model.
        stage: The stage.
        parts: The name of each part's model -> its plans, in order.
    """
    config = _config(name, "ensemble", stage.inputs, stage.outputs, "")
    steps: list[Value] = []
    for model, plans in parts.items():
        maps = {"input_map": plans[0].inputs, "output_map": plans[0].outputs}
        same = {field: [{"key": info.name, "value": info.name} for info in infos] for field, infos in maps.items()}
        steps.append({"model_name": model, "model_version": -1, **same})
    config["ensemble_scheduling"] = {"step": steps}
    return config


def pipeline_config(
    name: str, models: Mapping[str, str], inside: Sequence[str], backend: Backend, instances: int, memory_budget: str
) -> Config:
    """Return the configuration of the model that takes prompts and gives videos.

    Args:
        name: Of the model.
        models: Stage -> the model that runs it.
        inside: Stages that it runs itself; if there are any, it needs what they need.
        backend: The bundle's.
        instances: How many videos are made at once; on a GPU, per GPU.
        memory_budget: For stages inside, as ``Pipeline.open`` takes it; nothing for the default.
    """
    inputs: list[Value] = []
    for tensor, dtype in REQUEST_TENSORS.items():
        optional: Config = {} if tensor == "prompt" else {"optional": True}
        inputs.append({"name": tensor, "data_type": Word(_TYPES[dtype]), "dims": [1], **optional})
    outputs: list[Value] = [
        {"name": VIDEO, "data_type": Word("TYPE_STRING"), "dims": [1]},
        {"name": PIXELS, "data_type": Word("TYPE_UINT8"), "dims": [-1, -1, -1, 3]},
        {"name": NOTICES, "data_type": Word("TYPE_STRING"), "dims": [-1]},
    ]
    config: Config = {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "input": inputs,
        "output": outputs,
        "instance_group": [
            {"count": instances, "kind": Word("KIND_GPU" if inside and backend is not Backend.CPU else "KIND_CPU")}
        ],
    }
    settings = {
        "models": json.dumps(dict(models), sort_keys=True),
        "inside": ",".join(inside),
        "memory_budget": memory_budget,
    }
    return config | _parameters({key: value for key, value in settings.items() if value})


def _config(
    name: str, platform: str, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], file_name: str
) -> Config:
    config: Config = {"name": name, "platform": platform}
    if file_name:
        config["default_model_filename"] = file_name
    return config | {
        "max_batch_size": 0,
        "input": [_tensor(info) for info in inputs],
        "output": [_tensor(info) for info in outputs],
    }


def _tensor(info: TensorInfo) -> Config:
    dims = [size if isinstance(size, int) else -1 for size in info.shape]
    return {"name": info.name, "data_type": Word(_TYPES[info.dtype]), "dims": dims or [1]}


def _parameters(values: Mapping[str, str]) -> Config:
    entries: list[Value] = [{"key": key, "value": {"string_value": value}} for key, value in values.items()]
    return {"parameters": entries} if entries else {}
