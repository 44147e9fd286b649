"""The compose file: valid by the specification's schema, closed, and in time with the drain.

``compose-spec.json`` is the schema of the Compose Specification (github.com/compose-spec/compose-spec, Apache-2.0).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.dockerfile import stages_of

yaml = pytest.importorskip("yaml")
jsonschema_rs = pytest.importorskip("jsonschema_rs")

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("reelforge", "reelforge-cuda")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    value = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def test_the_schema_accepts_it(compose: dict[str, Any]) -> None:
    schema = json.loads(Path(__file__).with_name("compose-spec.json").read_text(encoding="utf-8"))
    validator = jsonschema_rs.validator_for(schema)
    assert [str(error) for error in validator.iter_errors(compose)] == []
    broken = {**compose, "services": {"reelforge": {**compose["services"]["reelforge"], "drain": 3}}}
    assert not validator.is_valid(broken), "the schema is one that can refuse"


@pytest.mark.parametrize("name", SERVICES)
def test_containers_are_closed(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "user"} & set(service)
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    bundle, data = service["volumes"]
    assert bundle.endswith(":/bundle:ro")
    assert data.split(":")[0] in compose["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_keys_come_from_outside_and_must_be_there(compose: dict[str, Any], name: str) -> None:
    keys = compose["services"][name]["environment"]["REELFORGE_API_KEYS"]
    assert re.fullmatch(r"\$\{REELFORGE_API_KEYS:\?[^}]+\}", keys)


@pytest.mark.parametrize("name", SERVICES)
def test_images_and_waiting_fit_the_dockerfile(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    path = ROOT / service["build"]["dockerfile"]
    final = stages_of(path)[-1]
    command = final.one("CMD").exec_form()
    drain = float(command[command.index("--drain") + 1].removesuffix("s"))
    assert float(service["stop_grace_period"].removesuffix("s")) >= drain + 20
    assert (ROOT / "deploy" / service["build"]["context"]).resolve() == ROOT
    assert service["ports"][0].endswith(":" + final.one("EXPOSE").rest)
    named = set(service["build"].get("args", {}))
    assert named <= {one.rest.partition("=")[0] for stage in stages_of(path) for one in stage.all("ARG")}


def test_the_gpu_is_reserved_for_the_service_that_needs_it(compose: dict[str, Any]) -> None:
    service = compose["services"]["reelforge-cuda"]
    assert service["profiles"] == ["cuda"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "deploy" not in compose["services"]["reelforge"]
