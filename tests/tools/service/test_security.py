"""Keys, limits, names of files, other origins, and what is in logs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reelforge.runtime.errors import RequestError
from reelforge.tools.service.settings import ApiKey, Limits, Settings, caller_of, keys_of_file, keys_of_text
from reelforge.tools.service.videos import Videos
from tests.tools.service.conftest import Serve
from tests.tools.service.fake_backend import WAIT_S, FakeBackend
from tests.tools.service.waiting import SMALL, ended, submit

ANN, BOB = "ann-0123456789-secret", "bob-0123456789-secret"
KEYS = (ApiKey.of("ann", ANN), ApiKey.of("bob", BOB))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_are_asked_for(serve: Serve) -> None:
    client = serve(keys=KEYS)
    for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": ANN}, {"Authorization": f"Basic {ANN}"}):
        for method, path in (("POST", "/v1/videos"), ("GET", "/v1/videos"), ("GET", "/v1/nothing")):
            answer = client.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/videos", params={"key": ANN}).status_code == 401, "keys do not go in addresses"
    assert client.get("/v1/limits").json()["needs_key"] is True
    assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200


def test_keys_are_asked_for_below_a_prefix_and_for_odd_paths(serve: Serve, settings: Settings) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.testclient import TestClient

    client = serve(keys=KEYS)
    for path in ("//v1/videos", "/V1/videos", "/v1/videos/", "/page/../v1/videos", "/x/v1/videos", "/v1//limits"):
        assert client.get(path).status_code in (401, 404), path
    below = TestClient(Starlette(routes=[Mount("/prefix", client.app)]))
    assert below.get("/prefix/v1/videos").status_code == 401
    assert below.get("/prefix/v1/videos", headers=bearer(ANN)).json()["data"] == []
    assert below.get("/prefix/v1/limits").status_code == below.get("/prefix/healthz").status_code == 200


def test_jobs_of_others_are_not_there(serve: Serve) -> None:
    client = serve(keys=KEYS)
    job_id = submit(client, headers=bearer(ANN))
    ended(client, job_id, headers=bearer(ANN))
    for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", "")):
        assert client.request(method, f"/v1/videos/{job_id}{path}", headers=bearer(BOB)).status_code == 404
    assert client.get("/v1/videos", headers=bearer(BOB)).json()["data"] == []
    assert client.get("/v1/videos", params={"after": job_id}, headers=bearer(BOB)).status_code == 404
    assert client.get(f"/v1/videos/{job_id}/content", headers=bearer(ANN)).status_code == 200


def test_the_same_idempotency_key_of_two_callers(serve: Serve) -> None:
    client = serve(keys=KEYS)
    made = {submit(client, headers={**bearer(key), "Idempotency-Key": "1"}) for key in (ANN, BOB)}
    assert len(made) == 2


def test_keys_are_compared_as_digests_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("reelforge.tools.service.settings.hmac.compare_digest", compare)
    assert caller_of(ANN, KEYS) == "ann"
    assert caller_of("x", KEYS) is None
    assert compared == [(32, 32)] * 4


def test_no_secret_is_kept_or_shown(serve: Serve, caplog: pytest.LogCaptureFixture, settings: Settings) -> None:
    caplog.set_level(logging.DEBUG)
    client = serve(keys=KEYS)
    submit(client, headers=bearer(ANN))
    client.get("/v1/videos", headers=bearer("wrong-but-still-secret"))
    client.post("/v1/videos", json={"prompt": 1}, headers=bearer(BOB))
    told = caplog.text + repr(KEYS) + repr(client.app)
    assert "secret" not in told
    assert client.get("/openapi.json").text.count("secret") == 0
    stored = b"".join(path.read_bytes() for path in settings.data.rglob("*") if path.is_file())
    assert b"secret" not in stored


def test_keys_from_files_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# who may\n\nann {ANN}\nbob sha256:{KEYS[1].digest.hex()}\n")
    assert keys_of_file(path) == KEYS
    assert keys_of_text(f"ann={ANN},\nbob={BOB}") == KEYS
    assert keys_of_text("") == ()


@pytest.mark.parametrize("line", ["ann", "ann short", f"a/b {ANN}", f"ann {ANN} more"])
def test_keys_that_are_none_are_not_repeated(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys"
    path.write_text(line)
    with pytest.raises(RequestError, match=r"line 1 of .* is no API key") as caught:
        keys_of_file(path)
    assert ANN not in str(caught.value)
    path.write_text("# nothing\n")
    with pytest.raises(RequestError, match="has none"):
        keys_of_file(path)
    with pytest.raises(RequestError, match="cannot be read"):
        keys_of_file(tmp_path / "none")
    with pytest.raises(RequestError, match="occurs twice"):
        Settings(tmp_path, tmp_path, keys=(KEYS[0], KEYS[0]))


def test_large_bodies_are_not_read(serve: Serve, backend: FakeBackend) -> None:
    client = serve(limits=Limits(body_bytes=1000))
    large = {"prompt": "x" * 1000}
    answer = client.post("/v1/videos", json=large)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")

    def pieces():  # type: ignore[no-untyped-def]
        for _ in range(1000):
            yield b"x" * 100

    assert client.post("/v1/videos", content=pieces()).status_code == 413, "without Content-Length"
    assert client.post("/v1/videos", content=b"x", headers={"Content-Length": "9" * 30}).status_code == 413
    assert not backend.ran


@pytest.mark.parametrize(
    ("limits", "asked", "said"),
    [
        (Limits(prompt_characters=3), {"prompt": "abcd"}, "prompt: 4 characters are more than 3"),
        (Limits(), {"negative_prompt": "x" * 4001, "cfg_scale": 2.0}, "negative_prompt: 4001"),
        (Limits(pixels=256), {}, "size: 512 pixels are more than 256"),
        (Limits(), {"size": "1024x1024"}, "size: 1048576 pixels are more than 12288"),
        (Limits(frames=1), {}, "frames: 5 are more than 1"),
        (Limits(steps=2), {}, "steps: 3 are more than 2"),
        (Limits(priority=0), {"priority": 1}, "priority: 1 is not in -0..0"),
        (Limits(deadline_s=5.0), {"deadline_s": 6.0}, "deadline_s: 6 is more than 5"),
        (Limits(), {"step_cache": "magcache:0.1,ratios=/etc/passwd"}, "with ratios names a file"),
        (Limits(), {"step_cache": "teacache:0.1, coefficients =/etc/passwd"}, "with coefficients names a file"),
        (Limits(), {"step_cache": "no:such"}, "step_cache"),
    ],
)
def test_limits_before_any_work(
    serve: Serve, backend: FakeBackend, limits: Limits, asked: dict[str, object], said: str
) -> None:
    answer = serve(limits=limits).post("/v1/videos", json={**SMALL, **asked})
    assert answer.status_code == 422
    assert any(said in problem for problem in answer.json()["error"]["problems"]), answer.text
    assert not backend.ran


@pytest.mark.parametrize("limits", [Limits(pixels=256), Limits(frames=5), Limits(steps=3)])
def test_defaults_obey_the_limits_too(serve: Serve, limits: Limits) -> None:
    answer = serve(limits=limits).post("/v1/videos", json={"prompt": ""})
    assert answer.status_code == 422
    assert "default" in answer.json()["error"]["problems"][0]


def test_places_in_the_queue(serve: Serve, backend: FakeBackend) -> None:
    client = serve(keys=KEYS, limits=Limits(waiting=3, waiting_per_caller=2))
    hold = backend.hold("held")
    submit(client, "held", headers=bearer(ANN))
    assert hold.entered.wait(WAIT_S)
    for _ in range(2):
        submit(client, headers=bearer(ANN))
    own = client.post("/v1/videos", json=SMALL, headers=bearer(ANN))
    assert (own.status_code, own.json()["error"]["code"]) == (429, "caller_queue_full")
    last = submit(client, headers=bearer(BOB))
    full = client.post("/v1/videos", json=SMALL, headers=bearer(BOB))
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    assert 'reelforge_requests_refused_total{reason="queue_full"} 1.0' in client.get("/metrics").text
    hold.released.set()
    assert ended(client, last, headers=bearer(BOB))["status"] == "completed"


def test_other_origins_are_closed_out(serve: Serve) -> None:
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    client = serve()
    for answer in (client.options("/v1/videos", headers=asks), client.get("/v1/limits", headers=asks)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_named_origins_are_let_in(serve: Serve) -> None:
    client = serve(origins=("https://good.example",), keys=KEYS)
    asks = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/videos", headers=asks).headers["access-control-allow-origin"] == "https://good.example"
    refused = client.get("/v1/videos", headers=asks)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://good.example")
    asks["Origin"] = "https://evil.example"
    assert "access-control-allow-origin" not in client.options("/v1/videos", headers=asks).headers


NAMES = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["../lock", "..%2flock", "%2e%2e/jobs.sqlite3", "video_", "video_" + "0" * 32 + "\n", "....//"]),
    st.text("0123456789abcdef", min_size=32, max_size=32).map("video_{}".format),
    st.text("./\\%2ef0\0", max_size=40).map("video_{}".format),
)


def test_no_id_leaves_the_store(serve: Serve, settings: Settings) -> None:
    client = serve()
    kept = submit(client)
    ended(client, kept)
    before = {path: path.read_bytes() for path in (settings.data / "videos").iterdir()}

    @settings_of_hypothesis
    @given(name=NAMES, method=st.sampled_from(["GET", "DELETE"]), suffix=st.sampled_from(["", "/content", "/events"]))
    def attempt(name: str, method: str, suffix: str) -> None:
        from urllib.parse import quote

        answer = client.request(method, f"/v1/videos/{quote(name, safe='%/.')}{suffix}")
        assert answer.status_code in (200, 404, 405, 422)
        if answer.status_code == 200:
            assert answer.json()["object"] == "list", "an empty name or dots lead to the list"

    attempt()
    assert {path: path.read_bytes() for path in (settings.data / "videos").iterdir()} == before


settings_of_hypothesis = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(name=NAMES.filter(lambda name: len(name) != 38))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_path_is_made_of_what_is_no_id(tmp_path: Path, name: str) -> None:
    videos = Videos.__new__(Videos)
    videos._videos = videos._work = tmp_path
    for make in (videos.video, videos.kept, videos.delete, videos.clear):
        with pytest.raises(ValueError, match="is no id of a job"):
            make(name)
