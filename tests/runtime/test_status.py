"""What is shown in a terminal while something runs, and that nothing is elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pytest

from vlmprune.runtime import status


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def watch(monkeypatch):
    """`watch()` makes stderr a terminal; called in the test, since pytest puts its own in the place of a fixture's."""

    def call():
        made = Terminal()
        monkeypatch.setattr(sys, "stderr", made)
        return made

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return call


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_bar_tells_steps_what_goes_on_and_the_time_left(watch):
    terminal = watch()
    with status.Bar(4) as bar:
        status.status("fopru [bold]: answering")
        assert "0/4" in terminal.getvalue()
        assert "-:--:-- left fopru [bold]: answering" in plain(terminal.getvalue())
        bar.step()
        bar.at(2.5)
        assert re.search(r"2/4.* 0:00:\d\d left fopru", plain(terminal.getvalue()))
    assert terminal.getvalue().endswith("\x1b[2K")  # nothing stays
    status.status("loading")
    assert terminal.getvalue().endswith("\r\x1b[2Kloading")  # no bar is left open


def test_what_stays_is_printed_without_a_bar_in_its_line(watch, capsys):
    terminal = watch()
    with status.Bar(2) as bar:
        status.status("first")
        status.note("a note")
        assert terminal.getvalue().endswith("\x1b[2Ka note\n")
        bar.step()
        status.show("a result")
        assert capsys.readouterr().out == "a result\n"
        assert terminal.getvalue().endswith("\x1b[2K")


def test_a_bar_closes_when_something_is_raised(watch):
    terminal = watch()

    def work():
        with status.Bar(2):
            status.status("first")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert terminal.getvalue().endswith("\x1b[2K")
    assert not status._bars


def test_no_colour(watch, monkeypatch):
    terminal = watch()
    with status.Bar(2) as bar:
        bar.step()
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", terminal.getvalue())
    terminal = watch()
    monkeypatch.setenv("NO_COLOR", "1")
    with status.Bar(2) as bar:
        bar.step()
    assert "1/2" in terminal.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", terminal.getvalue())


def test_silent_without_a_terminal(capsys):
    with status.Bar(2) as bar:
        status.status("first")
        bar.step()
        bar.say("stays")
    assert capsys.readouterr().err == "stays\n"
