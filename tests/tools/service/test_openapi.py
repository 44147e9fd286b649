"""The OpenAPI document, and schemathesis against it: no answer is a server's error, and all are as documented."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.tools.service.conftest import Serve
from tests.tools.service.waiting import SMALL, ended, submit

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


def test_the_document_has_everything(serve: Serve) -> None:
    document = serve().get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/videos/{video_id}/events",
        "/v1/limits", "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    create = document["paths"]["/v1/videos"]["post"]
    assert {"202", "401", "408", "413", "422", "429", "503"} <= set(create["responses"])
    assert create["security"] == [{"HTTPBearer": []}]
    assert "security" not in document["paths"]["/v1/limits"]["get"]
    assert document["components"]["schemas"]["VideoRequest"]["additionalProperties"] is False


def test_schemathesis_finds_nothing(serve: Serve) -> None:
    client = serve()
    kept = submit(client)
    ended(client, kept)
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 10

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of([operation.as_strategy() for operation in operations]), known=st.booleans())
    def attempt(case: schemathesis.Case, known: bool) -> None:
        if known and "video_id" in (case.path_parameters or {}) and case.method == "GET":
            case.path_parameters["video_id"] = kept
        case.call_and_validate(session=client, checks=CHECKS)

    attempt()
    assert client.post("/v1/videos", json=SMALL).status_code in (202, 429)
