"""Triton's own schema of configurations, from the package ``tritonclient``, and the rules that the server adds to it.

The schema's module is loaded by its path: the package around it asks for libraries that talk to a server.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import text_format

NAMES = {"TYPE_FP32": "float32", "TYPE_INT64": "int64", "TYPE_UINT8": "uint8", "TYPE_FP64": "float64"}


@cache
def schema() -> Any:
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(text: str) -> Any:
    """Return the configuration that a text states; an unknown field or word is an error."""
    return text_format.Parse(text, schema().ModelConfig())


def read_repository(root: Path) -> dict[str, Any]:
    """Return every model's configuration, checked as the server does before it loads anything.

    The rules are those of ``ValidateModelConfig`` and ``ValidateIOShape`` in the server's core, restated.
    """
    configs = {}
    for folder in sorted(root.iterdir()):
        assert folder.is_dir(), "the server would not look at it"
        config = parse((folder / "config.pbtxt").read_text(encoding="utf-8"))
        assert config.name == folder.name
        assert (folder / "1").is_dir()
        assert bool(config.platform) != bool(config.backend)
        assert config.max_batch_size == 0
        for tensor in (*config.input, *config.output):
            assert tensor.name
            assert tensor.data_type != schema().TYPE_INVALID
            assert tensor.dims, "tensors of rank 0 are not supported"
            assert all(size == -1 or size > 0 for size in tensor.dims)
        if config.platform == "ensemble":
            assert not config.instance_group
        else:
            (group,) = config.instance_group
            assert group.count >= 1
        configs[config.name] = config
    for config in configs.values():
        for step in config.ensemble_scheduling.step:
            part = configs[step.model_name]
            assert set(step.input_map) == {tensor.name for tensor in part.input}
            assert set(step.output_map) <= {tensor.name for tensor in part.output}
    return configs


def data_type(tensor: Any) -> str:
    """Return numpy's name for a tensor's type."""
    return NAMES[schema().DataType.Name(tensor.data_type)]
