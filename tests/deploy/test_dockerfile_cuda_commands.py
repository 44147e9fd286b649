"""The commands of ``Dockerfile.cuda``, run in a clean folder, as far as a machine without a GPU can follow them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.clean_folder import ROOT, CleanFolder
from tests.deploy.dockerfile import stages_of

PARTS = ("torch", "onnx", "onnxruntime", "tensorrt_rtx", "cuda", "fastapi")
EXPECTED = {"tensorrt_rtx", "cuda", "fastapi"}


@pytest.mark.slow
def test_the_image_holds_the_service_and_one_kind_of_plans(tmp_path: Path) -> None:
    folder = CleanFolder(tmp_path)
    build, _, final = stages_of(ROOT / "deploy" / "Dockerfile.cuda")
    folder.follow(build)
    shutil.rmtree(folder.path / "src")  # as the final image does not have it
    (folder.path / "data").mkdir()
    folder.follow(final)
    python = str(folder.path / "opt" / "reelforge" / "bin" / "python")
    look = f"import importlib.util as u; print(*[name for name in {PARTS} if u.find_spec(name)])"
    assert set(folder.run([python, "-c", look]).split()) == EXPECTED
    assert "rtx-4090-720p" in folder.run(["reelforge", "recipes"])
    folder.run([python, "-c", "import tensorrt_rtx; print(tensorrt_rtx.__version__)"])
    command = [*final.one("ENTRYPOINT").exec_form(), *map(folder.adapt, final.one("CMD").exec_form())]
    served = subprocess.run(
        command, cwd=folder.work, env=folder.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert served.returncode == 4, served.stderr  # no bundle is mounted
    assert "bundle" in served.stderr
    assert "Traceback" not in served.stderr
