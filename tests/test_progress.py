"""Progress on terminals, in log files, and not at all."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
from contextlib import contextmanager

import pytest

from terrasynth import progress
from terrasynth.progress import say, track


@pytest.fixture(autouse=True)
def _loud(monkeypatch):
    for name in ("TERRASYNTH_QUIET", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def terminal(monkeypatch):
    """Standard error as a terminal inside the block (a fixture's, pytest would undo); yields what reads the drawing."""
    main, side = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(side, "w") as stream, contextlib.redirect_stderr(stream):

        def read() -> str:
            stream.flush()
            drawn = b""
            while select.select([main], [], [], 0.1)[0]:
                drawn += os.read(main, 1_000_000)
            return drawn.decode()

        yield read
    os.close(main)


def test_a_log_file_gets_a_plain_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    with track(40, "painting", unit="images", done=10) as tracker:
        tracker.advance(5, loss=0.123456)
    text = capsys.readouterr().err
    assert re.fullmatch(r"painting: 15/40 images, loss 0\.1235, [\d.]+ images/s, .* left\n", text)


def test_a_short_job_writes_nothing_to_a_log_file(capsys):
    with track(3, "painting") as tracker:
        for _ in range(3):
            tracker.advance()
    assert tracker.done == 3
    assert capsys.readouterr() == ("", "")


def test_quiet_is_silent(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    with track(3, "painting", quiet=True) as tracker:
        tracker.advance()
    monkeypatch.setenv("TERRASYNTH_QUIET", "1")
    with track(3, "painting") as tracker:
        tracker.advance()
    say("hello")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TERRASYNTH_QUIET", "0")
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_the_rate_is_that_of_this_sitting(capsys, monkeypatch):
    clock = iter([0.0, 8.0, 16.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "_LINE_EVERY", 5.0)
    with track(2000, "training", done=1000) as tracker:
        tracker.advance(2)
        tracker.advance(30)
    assert capsys.readouterr().err.splitlines() == [
        "training: 1002/2000 steps, 4.0 s/step, 1 h 06 min left",
        "training: 1032/2000 steps, 2.0 steps/s, 8 min 04 s left",
    ]


def test_a_terminal_gets_a_bar_that_is_gone_afterwards(monkeypatch):
    monkeypatch.setattr(progress, "_DRAW_EVERY", 0.0)
    with terminal(monkeypatch) as read:
        with track(4, "painting") as tracker:
            tracker.advance(3, loss=0.5)
            progress._bars.refresh()
        drawn = read()
    assert "painting" in drawn
    assert "3/4" in drawn
    assert "loss 0.5" in drawn
    # Transient: in the end the line is erased and the cursor shown, both by ANSI sequences.
    assert drawn.rstrip().endswith("\x1b[2K\x1b[?25h")


def test_bars_nest_and_follow_one_another(monkeypatch):
    with terminal(monkeypatch) as read:
        with track(2, "outer") as outer:
            for name in ("first", "second"):
                with track(3, name) as inner:
                    inner.advance(3)
                    progress._bars.refresh()
                outer.advance()
            assert [task.description for task in progress._bars.tasks] == ["outer"]
            say("a remark")
        assert progress._bars is None
        with track(1, "next"):
            pass
        drawn = read()
    assert all(word in drawn for word in ("outer", "first", "second", "a remark", "next"))


def test_an_error_ends_the_bar(monkeypatch):
    with terminal(monkeypatch) as read:
        with pytest.raises(KeyError), track(2, "outer"), track(2, "inner"):
            raise KeyError
        assert "inner" in read()
    assert progress._bars is None
