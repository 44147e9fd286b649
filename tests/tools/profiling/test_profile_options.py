"""What a profile makes of a step cache, of classifier-free guidance, and of requests that a bundle does not serve."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from reelforge.runtime.attention.table import DENSE, AttentionTable, Pattern, Rule
from reelforge.runtime.step_cache.settings import StepCache
from reelforge.tools.main import main
from reelforge.tools.profiling.advice import Facts, advise
from reelforge.tools.profiling.compare import compare, unequal_work
from reelforge.tools.profiling.files import read_profile
from reelforge.tools.profiling.report_html import report
from reelforge.tools.profiling.report_style import colour
from reelforge.tools.profiling.schema import Kind, Profile, RunRecord, Span
from reelforge.tools.profiling.summary import gaps, is_loop, steps_of, summarise
from reelforge.tools.profiling.terminal import single_rows
from reelforge.tools.profiling.trace import trace_of
from reelforge.tools.profiling.work import attention_words, options_words, step_cache_words
from tests.runtime.fake_bundle import CACHED, write_fake_bundle
from tests.tools.profiling.profiles import LAYERS, PEAK, WORK, profile, run

QUICK = ["--height", "32", "--width", "48", "--frames", "5", "--threads", "1", "--no-cold", "--no-peak"]


@pytest.fixture(scope="module")
def cached_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached") / "cached.bundle"
    write_fake_bundle(path, stages=CACHED)
    return path


def measured(folder: Path, bundle: Path, *options: str) -> Profile:
    with pytest.raises(SystemExit) as end:
        main(["profile", str(bundle), "-o", str(folder / "out"), *QUICK, *options])
    assert end.value.code == 0
    return read_profile(folder / "out" / "profile.json")


def with_skips(made: RunRecord, *numbers: int) -> RunRecord:
    """Let some of a run's steps be skipped: they take a tenth of a millisecond."""
    spans = []
    for span in made.spans:
        number = int(span.name.split()[-1]) if span.kind is Kind.STEP else 0
        if number in numbers:
            span = Span(f"step {number}, skipped", Kind.SKIPPED_STEP, "dit", span.start_ms, 0.1)
        spans.append(span)
    return replace(made, spans=tuple(spans))


def cached_profile() -> Profile:
    cold, *warm, other = (with_skips(one, 2) for one in profile().runs)
    work = replace(WORK, step_cache="easycache:0.025")
    return profile(runs=(cold, *warm, other), cold=summarise([cold]), warm=summarise(warm[1:]), work=work)


def test_skipped_steps_are_apart(cached_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = "easycache:1000000,max-skips=2"
    found = measured(tmp_path, cached_bundle, "--steps", "8", "--step-cache", cache, "--repeats", "2")
    assert found.work.step_cache == "easycache:1e+06,max-skips=2"
    assert found.warm is not None
    # The first two steps and the last are computed, and one after each two skipped ones.
    kinds = ["step", "step", "skipped_step", "skipped_step", "step", "skipped_step", "skipped_step", "step"]
    for record in found.runs:
        assert [span.kind.value for span in steps_of(record)] == kinds
    assert (found.warm.skips, found.warm.steps.count, found.warm.skipped_steps.count) == (4, 8, 8)  # type: ignore[union-attr]
    calls = {stage.stage: stage.calls for stage in found.warm.stages}
    assert (calls["dit"], calls["step_reuse"]) == (4, 4)
    assert calls["step_change"] >= 4
    assert found.layers is not None
    assert {"dit", "step_change", "step_reuse"} <= {layer.stage for layer in found.layers.layers}
    output = capsys.readouterr().out
    assert "one computed step" in output
    assert "one skipped step (4 of 8)" in output
    assert "step cache easycache" in output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "4 of 8 steps were skipped" in page
    assert "step 3, skipped" in page
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "skipped_step"]
    assert names[:4] == ["step 3, skipped", "step 4, skipped", "step 6, skipped", "step 7, skipped"]


def test_guidance_is_two_calls_per_step(cached_bundle: Path, tmp_path: Path) -> None:
    options = ["--steps", "3", "--cfg-scale", "4", "--negative-prompt", "blur", "--guidance", "5", "--shift", "3"]
    found = measured(tmp_path, cached_bundle, *options, "--repeats", "1")
    work = found.work
    assert (work.cfg_scale, work.negative_prompt, work.guidance, work.shift) == (4.0, "blur", 5.0, 3.0)
    assert found.warm is not None
    calls = {stage.stage: stage.calls for stage in found.warm.stages}
    assert (calls["dit"], calls["guidance"], calls["llm"], calls["modulation"]) == (6, 3, 2, 2)
    assert found.warm.steps is not None
    assert found.warm.steps.count == 3
    assert found.layers is not None
    assert "guidance" in {layer.stage for layer in found.layers.layers}
    assert "classifier-free guidance 4 against &#x27;blur&#x27;" in (tmp_path / "out" / "report.html").read_text()
    assert any("twice per step" in advice.reason for advice in found.advice)


def test_the_plain_loop_is_the_one_that_generate_runs(cached_bundle: Path, tmp_path: Path) -> None:
    found = measured(tmp_path, cached_bundle, "--steps", "3", "--repeats", "1")
    assert found.warm is not None
    assert found.warm.skips == 0
    for record in found.runs:
        assert [span.name for span in record.spans if span.name.endswith("begin loop")] == ["dit begin loop"]
    assert found.layers is not None
    assert "dit" in {layer.stage for layer in found.layers.layers}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--negative-prompt", "blur"], "cfg_scale above 1"),
        (["--cfg-scale", "4"], "no stage 'guidance'"),
        (["--step-cache", "easycache:0.1"], "no stage 'step_change'"),
        (["--step-cache", "sometimes"], "cannot be read"),
        (["--attention", "radial"], "attention"),
        (["--dense-steps", "2"], "--attention"),
    ],
)
def test_what_the_bundle_does_not_serve_is_refused(
    fake_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["profile", str(fake_bundle), "-o", str(tmp_path / "out"), *QUICK, *options])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert "fix:" in error
    assert not (tmp_path / "out").exists()


def test_bundles_of_one_name_are_told_apart(cached_bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(cached_bundle, tmp_path / cached_bundle.name))
    found = measured(tmp_path, cached_bundle, "--steps", "3", "--repeats", "2", "--no-layers", "--compare", str(other))
    assert [record.bundle for record in found.runs].count(cached_bundle.name) == 3
    assert found.comparison is not None
    assert found.comparison.other.bundle == str(other)
    assert found.warm is not None
    assert found.warm.runs == 2


def test_another_number_of_skipped_steps_is_other_work() -> None:
    ours, theirs = [with_skips(run(), 2), with_skips(run(), 2)], [with_skips(run(), 2, 3), with_skips(run(), 2, 3)]
    found = compare(ours, theirs, replace(WORK, bundle="other.bundle"))
    assert {ratio.what for ratio in found.ratios} >= {"video", "step", "skipped step", "dit"}
    words = unequal_work(found, "my.bundle")
    assert "skipped 1 of 3 steps of my.bundle, and 2 of other.bundle" in words
    assert words in report(profile(comparison=found))
    assert unequal_work(compare(ours, ours, WORK), "my.bundle") == ""


def test_the_report_shows_skipped_steps() -> None:
    made = cached_profile()
    page = report(made)
    for words in ("step cache easycache:0.025", "1 of 3 skipped", "a computed step", "1 of 3 steps were skipped",
                  "step 2, skipped: 0.1 ms", "a skipped step", "one skipped step (1 of 3)"):  # fmt: skip
        assert words in page, words
    assert "skipped" not in report(profile()).partition("<body>")[2]
    assert [label for label, _, _ in single_rows(made)][:2] == ["one computed step", "one skipped step (1 of 3)"]
    names = [event["name"] for event in trace_of(made)["traceEvents"] if event.get("cat") == "skipped_step"]
    assert names == ["step 2, skipped"] * len(made.runs)


def test_a_gap_is_the_hosts_time_and_not_that_of_other_engines() -> None:
    spans = (
        Span("dit 1", Kind.RUN, "dit", 0.0, 10.0),
        Span("guidance 1", Kind.RUN, "guidance", 11.0, 5.0),
        Span("dit 2", Kind.RUN, "dit", 18.0, 10.0),
        Span("dit 3", Kind.RUN, "dit", 28.5, 10.0),
    )
    record = RunRecord("warm", "my.bundle", 40.0, spans, (), None, complete=True)
    assert gaps(record, is_loop) == pytest.approx([3.0, 0.5])


def test_parts_of_a_transformer_that_was_cut_are_the_loop() -> None:
    assert [stage for stage in ("dit", "dit_head", "dit_tail", "llm", "ditto") if is_loop(stage)] == [
        "dit", "dit_head", "dit_tail",
    ]  # fmt: skip
    assert colour("dit_body") == colour("dit") != colour("something")
    part = replace(LAYERS, layers=tuple(replace(layer, stage="dit_body") for layer in LAYERS.layers))
    made = profile()
    assert made.warm is not None
    found = advise(part, Facts(WORK, PEAK, made.warm, made.cold))
    assert any("--precision dit=int8" in one.action for one in found)


def test_advice_with_a_step_cache_is_about_its_threshold() -> None:
    made = cached_profile()
    assert made.warm is not None
    found = advise(LAYERS, Facts(made.work, PEAK, made.warm, made.cold))
    (advice,) = [one for one in found if one.about == "step cache"]
    assert "higher threshold than that of easycache:0.025" in advice.action
    assert "1 of 3 steps are skipped" in advice.reason


def test_options_in_words() -> None:
    assert options_words(WORK) == []
    table = AttentionTable(Pattern.RADIAL, (Rule(decay=1.0),), dense_steps=5)
    assert attention_words(table) == "radial, the first 5 steps dense"
    assert attention_words(DENSE) == "dense"
    work = replace(WORK, step_cache="easycache:0.1", cfg_scale=6.0, attention=attention_words(table))
    assert options_words(work) == [
        "step cache easycache:0.1", "classifier-free guidance 6", "attention radial, the first 5 steps dense",
    ]  # fmt: skip
    for text in ("easycache:0.025", "easycache:0.1,reuse=residual,warmup=2,max-skips=4"):
        assert step_cache_words(StepCache.parse(text)) == text
