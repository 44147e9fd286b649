"""A real Triton: the server in the wheel of nvidia-pytriton, which has the Python backend and no other.

What runs in the pipeline's model therefore runs as in production. For the models beside it, the ONNX Runtime backend is
stood in for by a model of three lines under the very configuration that was exported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.tools.triton.repository import ExportRequest, export_repository

PACKAGE = importlib.util.find_spec("pytriton")
OLD_NUMPY = Path(sys.prefix) / "triton_python"
"""NumPy 1.26, which this server's Python backend was compiled against; with NumPy 2 it reads every tensor wrongly."""

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
REQUEST = Request("a ball", height=32, width=48, frames=5, steps=3, seed=3)
GUIDED = Request("a ball", height=32, width=48, frames=5, steps=3, cfg_scale=3.0, negative_prompt="blue")

STAND_IN = """
import pathlib
import numpy as np
import onnxruntime
import triton_python_backend_utils as utilities

class TritonPythonModel:
    def initialize(self, args):
        folder = pathlib.Path(args["model_repository"]) / args["model_version"]
        (graph,) = folder.glob("*.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(graph, options)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        inputs = {}
        for node in self.session.get_inputs():
            array = utilities.get_input_tensor_by_name(request, node.name).as_numpy()
            inputs[node.name] = array if node.shape else array.reshape(())
        wanted = request.requested_output_names()
        arrays = [np.atleast_1d(array) for array in self.session.run(wanted, inputs)]
        return utilities.InferenceResponse([utilities.Tensor(*pair) for pair in zip(wanted, arrays)])
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class RefusedError(Exception):
    pass


class Server:
    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, body: bytes | None = None, header_bytes: int = 0) -> Any:
        url = f"http://127.0.0.1:{self.port}/v2/{path}"
        headers = {"Inference-Header-Content-Length": str(header_bytes)} if body else {}
        request = urllib.request.Request(url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise RefusedError(error.code, error.read().decode()) from error
        return json.loads(text) if text else None

    def infer(self, request: Request) -> np.ndarray[Any, Any]:
        tensors, data = [], b""
        for name, value in vars(request).items():
            if isinstance(value, str):
                kind, packed = "BYTES", struct.pack("<I", len(value.encode())) + value.encode()
            elif isinstance(value, int):
                kind, packed = "INT64", struct.pack("<q", value)
            elif isinstance(value, float):
                kind, packed = "FP64", struct.pack("<d", value)
            else:
                continue
            size = {"binary_data_size": len(packed)}
            tensors.append({"name": name, "shape": [1], "datatype": kind, "parameters": size})
            data += packed
        wanted = [{"name": "pixels", "parameters": {"binary_data": False}}]
        header = json.dumps({"inputs": tensors, "outputs": wanted}).encode()
        answer = self.get("models/reelforge/infer", header + data, len(header))
        (pixels,) = answer["outputs"]
        assert pixels["datatype"] == "UINT8"
        return np.array(pixels["data"], np.uint8).reshape(pixels["shape"])


@contextmanager
def serving(root: Path, log: Path) -> Iterator[Server]:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations
    home = Path(PACKAGE.submodule_search_locations[0]) / "tritonserver"
    backends = root.parent / f"backends_of_{root.name}"  # the server starts the stub through a shell, unquoted
    shutil.copytree(home / "backends", backends)
    stub = backends / "python" / "triton_python_backend_stub"
    shutil.copy(home / "python_backend_stubs" / VERSION / stub.name, stub)
    port = free_port()
    command = [
        home / "bin" / "tritonserver",
        f"--model-repository={root}",
        f"--backend-directory={backends}",
        f"--http-port={port}",
        "--http-address=127.0.0.1",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--allow-gpu-metrics=false",
        "--exit-timeout-secs=5",
        f"--backend-config=python,shm-region-prefix-name=reelforge-{os.getpid()}-{port}",
    ]
    paths = [str(home.parent.parent / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = os.environ | {
        "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as output:
        # The embedded interpreter looks into its working directory before anywhere else.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=OLD_NUMPY)
    try:
        server = Server(port)
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            try:
                server.get("health/ready")
            except (RefusedError, urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
            else:
                break
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.skipif(
    PACKAGE is None or not OLD_NUMPY.is_dir(), reason="nvidia-pytriton, and in it a Triton server, is not installed"
)
def test_the_repository_on_a_real_server(whole_bundle: Path, tmp_path: Path) -> None:
    """With every stage a model, and with every stage inside: frames are those of ``Pipeline.generate``."""
    bundle = Bundle.open(whole_bundle)
    with Pipeline.open(whole_bundle, threads=1) as pipeline:
        expected = [pipeline.generate(request) for request in (REQUEST, GUIDED)]
    for inside in ((), ("all",)):
        root = tmp_path / f"models{len(inside)}"
        export_repository(bundle, ExportRequest(root, inside=inside))
        for config in root.glob("reelforge_*/config.pbtxt"):
            exported = config.read_text()
            assert 'platform: "onnxruntime_onnx"' in exported
            config.write_text(
                exported.replace('platform: "onnxruntime_onnx"', 'backend: "python"').replace(
                    f'default_model_filename: "{config.parent.name.removeprefix("reelforge_")}.onnx"\n', ""
                )
            )
            (config.parent / "1" / "model.py").write_text(STAND_IN)
        with serving(root, tmp_path / f"log{len(inside)}") as server:
            for request, frames in zip((REQUEST, GUIDED), expected, strict=True):
                np.testing.assert_array_equal(server.infer(request), frames)
            with pytest.raises(RefusedError, match="height=30 is not supported by bundle") as caught:
                server.infer(Request("a ball", height=30))
            assert caught.value.args[0] == 400
            config = server.get("models/reelforge/config")
            assert config["max_batch_size"] == 0
            assert [tensor["name"] for tensor in config["input"] if not tensor["optional"]] == ["prompt"]
