"""What is said about a video that was interrupted: only what is there is promised."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from reelforge.runtime import Progress, Stop
from reelforge.runtime.events import Event
from reelforge.tools.interruption import Unfinished, finishing_the_step

NOTHING = "interrupted; nothing was written."


def advice(folder: Path, *steps: tuple[str, int], step_was_finished: bool = True) -> str:
    def events() -> Generator[Event, None, None]:
        for phase, step in steps:
            yield Progress(phase, step, 4)

    unfinished = Unfinished(folder / "x.npy")
    assert len(list(unfinished.watch(events()))) == len(steps)
    return unfinished.advice(Path("my bundle"), "a.mp4", step_was_finished)


@pytest.mark.parametrize("steps", [(), (("text", 1),), (("text", 2), ("conditioning", 1))])
def test_before_the_loop_there_is_nothing(tmp_path: Path, steps: tuple[tuple[str, int], ...]) -> None:
    (tmp_path / "x.npy").touch()  # of an earlier run
    assert advice(tmp_path, *steps) == NOTHING


def test_a_step(tmp_path: Path) -> None:
    kept = tmp_path / "x.step-3.npy"
    assert advice(tmp_path, ("sampling", 3)) == NOTHING
    kept.touch()
    assert advice(tmp_path, ("sampling", 3)).endswith(f"3 of 4 steps are kept in '{kept}': go on with the same command "
                                                     f"and --resume {kept}")  # fmt: skip
    assert advice(tmp_path, ("sampling", 3), step_was_finished=False) == NOTHING


@pytest.mark.parametrize("last", [("sampling", 4), ("decoding", 1)])
def test_final_latents(tmp_path: Path, last: tuple[str, int]) -> None:
    assert advice(tmp_path, last) == NOTHING
    (tmp_path / "x.npy").touch()
    assert advice(tmp_path, last).endswith(f"go on with reelforge decode 'my bundle' {tmp_path / 'x.npy'} -o a.mp4")


def test_the_second_time_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = Stop()
    with finishing_the_step(stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted
        assert stop.keeps
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.count("Ctrl-C again ends at once") == 1


def test_a_terminal_that_is_gone_does_not_keep_the_work_going(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_arguments: object, **_options: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("click.echo", gone)
    stop = Stop()
    with finishing_the_step(stop), pytest.raises(BrokenPipeError):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.wanted


def test_other_threads_hear_of_no_signals() -> None:
    def work() -> None:
        with finishing_the_step(Stop()):
            done.append(signal.getsignal(signal.SIGINT))

    done: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]
