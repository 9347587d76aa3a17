"""Writing behind the caller's back: in order, never far behind, and not after an error."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rlhf_ray.run import Run, read_metrics
from rlhf_ray.rundir.writer import MOST_WAITING, Writer


def test_jobs_are_carried_out_in_order_by_another_thread() -> None:
    writer, done = Writer(), []
    for number in range(20):
        writer.submit(lambda n: done.append((n, threading.current_thread())), number)
    writer.wait()
    writer.close()
    assert [number for number, _ in done] == list(range(20))
    assert {thread for _, thread in done} - {threading.current_thread()} == {done[0][1]}


def test_who_is_too_far_ahead_waits() -> None:
    writer, gate, done = Writer(), threading.Event(), []
    writer.submit(gate.wait, 30)
    for number in range(MOST_WAITING - 1):
        writer.submit(done.append, number)
    assert not done
    releaser = threading.Timer(0.05, gate.set)
    releaser.start()
    writer.submit(done.append, "last")
    assert gate.is_set()  # the last job was not taken before there was room
    writer.close()
    assert done == [*range(MOST_WAITING - 1), "last"]


def test_nothing_is_carried_out_after_an_error_which_every_later_call_raises() -> None:
    writer, done = Writer(), []

    def fail() -> None:
        raise OSError("disk full")

    failed = writer.submit(fail)
    with pytest.raises(OSError, match="disk full"):
        failed.result()
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            writer.submit(done.append, 1)
    with pytest.raises(OSError, match="disk full"):
        writer.wait()
    writer.close(quietly=True)
    assert not done


def test_what_follows_a_row_is_not_written_when_the_row_could_not_be(tmp_path: Path) -> None:
    done: list[int] = []
    run = Run.open(tmp_path, {}, resume=False)
    run.log(1, {"loss": 1.0})
    run.log(2, {"step": 2.0})
    with pytest.raises(AssertionError, match="is the line's own key"):
        run.later(done.append, 2).result()
    with pytest.raises(AssertionError, match="is the line's own key"):
        run.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    assert not done
    with Run.open(tmp_path, {}, resume=True):  # the folder was given free
        pass


def test_an_error_of_the_run_itself_goes_first_and_what_was_logged_is_there(tmp_path: Path) -> None:
    def train() -> None:
        with Run.open(tmp_path, {}, resume=False) as run, run.written():
            run.log(1, {"loss": 1.0})
            run.samples(1, [])  # which there must be some of
            raise ValueError("the run's own")

    with pytest.raises(ValueError, match="the run's own"):
        train()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
