import io
from contextlib import redirect_stderr

import pytest

from soju.core.progress import set_quiet, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    yield Terminal()
    set_quiet(False)


ITEMS = [[1], "two", None]


def test_items_pass_through_unchanged_while_a_bar_is_drawn(terminal):
    with redirect_stderr(terminal):
        passed = list(track(ITEMS, "reading"))
    assert [a is b for a, b in zip(passed, ITEMS, strict=True)] == [True] * 3
    assert "reading" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


def test_items_without_a_length_pass_through(terminal):
    with redirect_stderr(terminal):
        assert list(track(iter(ITEMS), "reading")) == ITEMS
        assert "3/?" in terminal.getvalue()
        assert list(track(iter(range(7)), "counting", total=7)) == [0, 1, 2, 3, 4, 5, 6]
    assert "7/7" in terminal.getvalue()


def test_a_bar_within_a_bar_is_allowed(terminal):
    with redirect_stderr(terminal):
        met = [(a, b) for a in track("ab", "outer") for b in track("cd", "inner")]
    assert met == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]


def test_an_error_of_the_reader_reaches_the_caller(terminal):
    def broken():
        yield 1
        raise ValueError("broken row")

    with redirect_stderr(terminal), pytest.raises(ValueError, match="broken row"):
        list(track(broken(), "reading"))


def test_nothing_is_drawn_when_quiet(terminal):
    set_quiet(True)
    with redirect_stderr(terminal):
        assert list(track(ITEMS, "reading")) == ITEMS
    assert terminal.getvalue() == ""


def test_nothing_is_drawn_without_a_terminal():
    with redirect_stderr(io.StringIO()) as stream:
        assert list(track(ITEMS, "reading")) == ITEMS
    assert stream.getvalue() == ""


def test_items_are_asked_for_one_at_a_time():
    asked = []

    def reader():
        for number in range(3):
            asked.append(number)
            yield number

    items = track(reader(), "reading")
    assert (next(items), asked) == (0, [0])
