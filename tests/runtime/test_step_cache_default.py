"""The step cache that a bundle gives to requests that say nothing about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reelforge.runtime import Pipeline, Request
from reelforge.runtime.bundle.open import Bundle
from reelforge.runtime.manifest import Manifest
from reelforge.runtime.request import resolve_request
from reelforge.runtime.step_cache.settings import OFF, StepCache
from tests.runtime.fake_bundle import CACHED, write_fake_bundle

DEFAULT = "easycache:100,max-skips=2"
SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 14}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundles") / "cached.bundle"
    write_fake_bundle(path, stages=CACHED)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def manifest(bundle: Bundle) -> Manifest:
    return replace(bundle.manifest, step_cache=DEFAULT)


def test_who_decides(bundle: Bundle, manifest: Manifest) -> None:
    asked = StepCache.parse("easycache:0.2")

    def resolved(manifest: Manifest, cache: StepCache | None) -> StepCache | None:
        return resolve_request(Request("", step_cache=cache), manifest, "x").step_cache

    assert resolved(manifest, None) == StepCache.parse(DEFAULT)
    assert resolved(manifest, asked) == asked
    assert resolved(manifest, OFF) is None
    assert resolved(bundle.manifest, None) is None
    assert resolved(bundle.manifest, OFF) is None
    assert resolved(bundle.manifest, asked) == asked
    assert StepCache.parse(" off ") == StepCache.parse("easycache:0") == OFF


def test_it_is_the_same_as_asking_for_it(bundle: Bundle, manifest: Manifest) -> None:
    with Pipeline(Bundle(bundle.path, manifest)) as pipeline:
        default = pipeline.generate(Request("a ball", **SMALL))  # type: ignore[arg-type]
        off = pipeline.generate(Request("a ball", **SMALL, step_cache=OFF))  # type: ignore[arg-type]
    with Pipeline(bundle) as pipeline:
        asked = pipeline.generate(Request("a ball", **SMALL, step_cache=StepCache.parse(DEFAULT)))  # type: ignore[arg-type]
        plain = pipeline.generate(Request("a ball", **SMALL))  # type: ignore[arg-type]
    np.testing.assert_array_equal(default, asked)
    np.testing.assert_array_equal(off, plain)
    assert (default != plain).any()


def test_the_digest_names_it_and_older_bundles_keep_theirs(bundle: Bundle, manifest: Manifest, tmp_path: Path) -> None:
    assert manifest.with_content_digest().content_digest != bundle.manifest.content_digest
    path = tmp_path / "older.bundle"
    write_fake_bundle(path, stages=CACHED)
    content = json.loads((path / "manifest.json").read_text())
    del content["step_cache"]
    (path / "manifest.json").write_text(json.dumps(content))
    assert Bundle.open(path).manifest == bundle.manifest
