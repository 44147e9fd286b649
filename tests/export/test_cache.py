"""The plan cache: what a plan's key covers and what it does not, and builds that find, wait for, or miss a plan."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from reelforge.export import cache
from reelforge.export.cache import PlanCache, PlanKey, builder_digest, parse_size
from reelforge.export.engines.request import Expected, PlanRequest, Profile
from reelforge.export.graph_file import graph_digest
from reelforge.runtime.cache_folder import default_folder
from reelforge.runtime.errors import BuildError, RequestError
from reelforge.runtime.manifest import TensorInfo, WeightEntry
from reelforge.runtime.recipe import Precision, Target

REQUEST = PlanRequest(
    stage="dit",
    graph="/b/dit.onnx",
    inputs=(TensorInfo("latents", "float32", ("batch", 16, "frames")), TensorInfo("sigma_step", "float32", ())),
    outputs=(TensorInfo("velocity", "float32", ("batch", 16, "frames")),),
    target=Target.parse("rtx:sm89+sm120"),
    profiles=(Profile("small", {"batch": (1, 1, 1), "frames": (1, 9, 9)}), Profile("large", {"frames": (1, 33, 33)})),
    expected=Expected({"double.0.q": Precision.FP8, "double.0.k": Precision.FP8}, {"a.0": Precision.FP8}, ("m", "n")),
    plan="/b/plans/dit.plan",
    receipt="/b/receipts/dit.json",
    scratch="/tmp",
)
KEY = PlanKey(REQUEST, "d" * 64, "tensorrt_rtx 1.7.1.116")
FIRST, SECOND = REQUEST.profiles


def with_request(**changes: Any) -> PlanKey:
    return replace(KEY, request=replace(REQUEST, **changes))


def with_expected(**changes: Any) -> PlanKey:
    return with_request(expected=replace(REQUEST.expected, **changes))


# The key.

OTHER_KEYS = {
    "graph digest": replace(KEY, graph_digest="e" * 64),
    "library version": replace(KEY, backend="tensorrt_rtx 1.8.0"),
    "builder": replace(KEY, builder="f" * 64),
    "device": replace(KEY, device="NVIDIA H100 PCIe"),
    "stage": with_request(stage="vae_decoder"),
    "backend": with_request(target=Target.parse("trt:sm89+sm120")),
    "fewer architectures": with_request(target=Target.parse("rtx:sm89")),
    "other architectures": with_request(target=Target.parse("rtx:sm89+sm121")),
    "name of an input": with_request(inputs=(TensorInfo("x", "float32", ("batch", 16, "frames")), REQUEST.inputs[1])),
    "type of an input": with_request(inputs=(REQUEST.inputs[0], TensorInfo("sigma_step", "int64", ()))),
    "fixed dimension": with_request(outputs=(TensorInfo("velocity", "float32", ("batch", 17, "frames")),)),
    "named dimension": with_request(outputs=(TensorInfo("velocity", "float32", ("batch", 16, "f")),)),
    "no profile less": with_request(profiles=(FIRST,)),
    "order of profiles, which have numbers in a plan": with_request(profiles=(SECOND, FIRST)),
    "name of a profile, which is in the receipt": with_request(profiles=(replace(FIRST, name="tiny"), SECOND)),
    "range": with_request(profiles=(replace(FIRST, dimensions={"batch": (1, 1, 1), "frames": (1, 9, 10)}), SECOND)),
    "optimum": with_request(profiles=(replace(FIRST, dimensions={"batch": (1, 1, 1), "frames": (1, 5, 9)}), SECOND)),
    "layer's precision": with_expected(layers={"double.0.q": Precision.FP8, "double.0.k": Precision.INT8}),
    "a layer less": with_expected(layers={"double.0.q": Precision.FP8}),
    "attention's precision": with_expected(attentions={"a.0": Precision.BF16}),
    "an attention that may be decomposed": with_expected(decomposed=("m",)),
}


def test_everything_that_matters_changes_the_key() -> None:
    digests = {name: key.sha256 for name, key in OTHER_KEYS.items()}
    assert KEY.sha256 not in digests.values()
    assert len(set(digests.values())) == len(digests)
    assert all(len(digest) == 64 for digest in digests.values())


@pytest.mark.parametrize(
    "same",
    [
        with_request(graph="/c/dit.onnx"),
        with_request(plan="/c/x.plan", receipt="/c/x.json", scratch="/var/tmp"),
        with_request(target=replace(REQUEST.target, architectures=("sm120", "sm89"))),
        with_expected(layers={"double.0.k": Precision.FP8, "double.0.q": Precision.FP8}),
        with_expected(decomposed=("n", "m")),
        with_request(profiles=(replace(FIRST, dimensions={"frames": (1, 9, 9), "batch": (1, 1, 1)}), SECOND)),
    ],
    ids=["graph's path", "other paths", "architectures", "layers", "decomposed", "dimensions"],
)
def test_where_files_lie_and_in_which_order_sets_are_written_does_not(same: PlanKey) -> None:
    assert same.sha256 == KEY.sha256


def test_no_field_of_a_request_is_forgotten() -> None:
    """A field that somebody adds enters the key by itself; to leave it out takes a line in the cache and one here."""
    left_out = {"graph", "plan", "receipt", "scratch"}
    assert set(KEY.content()["request"]) == {field.name for field in fields(PlanRequest)} - left_out
    assert set(KEY.content()) - {"receipt_version"} == {field.name for field in fields(PlanKey)}
    for name in left_out:  # these must not tell anything but a place
        assert isinstance(getattr(REQUEST, name), str)


@pytest.mark.parametrize(
    ("module", "matters"),
    [
        ("engines/child.py", True),
        ("engines/builder.py", True),
        ("engines/request.py", True),
        ("passes/quantise_attention.py", True),  # the scale that the builder gives to softmax
        ("build.py", False),
    ],
)
def test_whoever_changes_the_builder_finds_no_plan_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, matters: bool
) -> None:
    assert KEY.content()["builder"] == builder_digest()
    changed = Path(cache.__file__).parent / module
    assert changed.is_file()
    source = cache._source

    def elsewhere(name: str) -> Path | None:
        path = source(name)
        if path is None or path.resolve() != changed.resolve():
            return path
        (tmp_path / "copy.py").write_text(path.read_text() + "# changed\n")
        return tmp_path / "copy.py"

    monkeypatch.setattr(cache, "_source", elsewhere)
    assert (PlanKey(REQUEST, KEY.graph_digest, KEY.backend).sha256 != KEY.sha256) == matters


def test_another_receipt_format_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KEY.sha256
    monkeypatch.setattr(cache, "RECEIPT_VERSION", 99)
    assert KEY.sha256 != before


def linear(location: str, offset: int) -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy")
    return bytes(helper.make_model(helper.make_graph([node], "g", [x], [y], [weight])).SerializeToString())


def test_a_weight_s_content_matters_and_its_place_does_not() -> None:
    def key(data: bytes, sha256: str) -> str:
        weight = WeightEntry("w", "F32", (2, 2), "weights/a", 0, 16, sha256)
        return replace(KEY, graph_digest=graph_digest(data, {"w": weight})).sha256

    first = key(linear("weights/a", 0), "a" * 64)
    assert key(linear("weights/b", 4096), "a" * 64) == first
    assert key(linear("weights/a", 0), "b" * 64) != first


# Builds.


Output = Callable[[], tuple[Path, Path]]


class Builder:
    """Compiles nothing: writes a plan that follows from the key, and counts."""

    def __init__(self, key: PlanKey = KEY, size: int = 1000) -> None:
        self.key, self.size, self.calls = key, size, 0

    def content(self) -> bytes:
        return (self.key.sha256.encode() * self.size)[: self.size]

    def __call__(self, plan: Path, receipt: Path) -> None:
        self.calls += 1
        plan.write_bytes(self.content())
        receipt.write_text(self.key.sha256)


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def plans(tmp_path: Path, notices: list[str]) -> PlanCache:
    return PlanCache(tmp_path / "cache", 10_000, notices.append)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """Give the two paths of another bundle each time."""
    count = iter(range(100))

    def paths() -> tuple[Path, Path]:
        folder = tmp_path / f"bundle{next(count)}"
        folder.mkdir()
        return folder / "dit.plan", folder / "dit.json"

    return paths


def run(plans: PlanCache, builder: Builder, output: Output) -> bool:
    """Fetch or build, and check what came out of it."""
    plan, receipt = output()
    hit = plans.fetch_or_build(builder.key, builder, plan, receipt)
    assert plan.read_bytes() == builder.content()
    assert receipt.read_text() == builder.key.sha256
    return hit


def test_a_plan_is_built_once(plans: PlanCache, output: Output, notices: list[str]) -> None:
    builder = Builder()
    assert [run(plans, builder, output) for _ in range(3)] == [False, True, True]
    assert builder.calls == 1
    other = Builder(OTHER_KEYS["layer's precision"])
    assert [run(plans, other, output) for _ in range(2)] == [False, True]
    assert run(plans, builder, output)
    assert notices == []
    assert [entry.content["request"]["stage"] for entry in plans.entries()] == ["dit", "dit"]
    assert [entry.key for entry in plans.entries()] == [other.key.sha256, KEY.sha256]
    assert plans.trim(0)
    assert plans.entries() == []


def test_another_build_finds_it(plans: PlanCache, output: Output) -> None:
    builder = Builder()
    run(plans, builder, output)
    assert run(PlanCache(plans.folder), builder, output)


def test_a_failed_build_is_not_kept(plans: PlanCache, output: Output) -> None:
    def fails(plan: Path, receipt: Path) -> None:
        plan.write_bytes(b"half")
        raise BuildError("the compiler said no.")

    with pytest.raises(BuildError, match="said no"):
        plans.fetch_or_build(KEY, fails, *output())
    assert plans.entries() == []
    assert not run(plans, Builder(), output)


def test_a_damaged_entry_is_compiled_again(plans: PlanCache, output: Output, notices: list[str]) -> None:
    builder = Builder()
    run(plans, builder, output)
    os.truncate(plans.folder / "plans" / KEY.sha256 / "plan", 10)
    assert not run(plans, builder, output)
    assert notices == [
        "the cached plan of stage dit is damaged (plan has 10 bytes instead of 1,000); it is compiled again."
    ]
    assert run(plans, builder, output)
    assert builder.calls == 2


def test_a_bundle_that_is_altered_in_place_alters_no_other(plans: PlanCache, output: Output) -> None:
    """Both have the same file; so the cache notices, and gives out a sound one."""
    builder = Builder()
    plan, receipt = output()
    plans.fetch_or_build(KEY, builder, plan, receipt)
    plan.write_bytes(b"?" * 1000)
    assert not run(plans, builder, output)
    assert plan.read_bytes() == b"?" * 1000


def test_a_plan_that_is_too_large(plans: PlanCache, output: Output, notices: list[str]) -> None:
    run(plans, Builder(), output)
    assert not run(plans, Builder(OTHER_KEYS["device"], 10_000), output)
    assert notices == [
        f"the plan of stage dit is not kept in the cache {str(plans.folder)!r}: it has 10,000 bytes, and the cache may "
        "have 10,000 in all (--cache-size)."
    ]
    assert run(plans, Builder(), output)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, code: int) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (os, "link"), (os, "rename")])
def test_the_disk_is_full_while_a_plan_is_kept(
    plans: PlanCache, output: Output, notices: list[str], monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    """The bundle has the plan, so the build goes on, and says what it could not do."""
    with failing(monkeypatch, owner, name, errno.ENOSPC):
        assert not run(plans, Builder(), output)
    assert notices == [
        f"the plan of stage dit is not kept in the cache {str(plans.folder)!r}: No space left on device."
    ]
    assert plans.entries() == []
    assert [path.name for path in (plans.folder / "plans").iterdir()] == []


def test_a_cache_that_cannot_be_locked_any_more(
    plans: PlanCache, output: Output, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, receipt = output()
    with failing(monkeypatch, os, "open", errno.EROFS):
        hit = plans.fetch_or_build(KEY, lambda _plan, _receipt: None, plan, receipt)
    assert not hit
    assert notices == ["the plan cache is not used for stage dit: Read-only file system."]


# A folder that cannot be used.


def test_a_folder_that_cannot_be_made() -> None:
    """Not even by root."""
    with pytest.raises(BuildError, match=r"the cache folder '/proc/cache' cannot be used: ") as caught:
        PlanCache(Path("/proc/cache"))
    assert "received: /proc/cache   expected: a folder that this user may write" in str(caught.value)
    assert "fix: choose another with --cache-dir, or build with --no-cache" in str(caught.value)


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be used"):
        PlanCache(tmp_path / "file")


@contextmanager
def an_ordinary_user(folder: Path) -> Iterator[None]:
    """Be no superuser for a while, who may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    for parent in folder.parents:
        if not parent.stat().st_mode & 1:
            parent.chmod(parent.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder(tmp_path: Path, plans: PlanCache, output: Output) -> None:
    """Found when the cache is opened, and not when the first plan was compiled for hours."""
    run(plans, Builder(), output)
    folders = [path for path in (plans.folder, *plans.folder.rglob("*")) if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    try:
        with an_ordinary_user(plans.folder), pytest.raises(BuildError, match="cannot be used: Permission denied"):
            PlanCache(plans.folder)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert run(PlanCache(plans.folder), Builder(), output)


# What the command line says.


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CACHE_HOME": "/var/cache/me"}, "/var/cache/me/reelforge"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/reelforge"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/reelforge"),
        ({}, "/home/me/.cache/reelforge"),
    ],
)
def test_the_default_folder(environment: dict[str, str], folder: str) -> None:
    assert default_folder(environment, Path("/home/me")) == Path(folder)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50GB", 50 * 10**9),
        ("1.5TB", 1_500_000_000_000),
        (" 800 MB ", 800 * 10**6),
        ("64GiB", 64 * 2**30),
        ("10kb", 10_000),
        ("0", 0),
        ("12", 12),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "50 apples", "1e9", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_size(text)
    assert f"the size {text!r} cannot be read" in str(caught.value)
    assert "expected: a number with B, kB, MB, GB, TB" in str(caught.value)
    assert "fix: write for example 50GB" in str(caught.value)
