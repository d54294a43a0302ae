"""What a user sees at the bar of a run."""

import io
import sys

from examples.runs.progress import Progress


class Terminal(io.StringIO):
    """Remembers what is written to it."""

    def isatty(self):
        return True

    def last(self):
        return self.getvalue().split("\r")[-1]


def test_the_bar_names_what_is_going_on_and_the_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    progress = Progress(100, unit="step")
    assert terminal.last().startswith("getting ready   0%|")
    assert "? left, 00:00 so far" in terminal.last()
    progress.skip(20)
    progress.figures("seed 1 BinaryRelax", bits=2.6789)
    progress._bar.start_t -= 10
    progress.advance(40)
    progress.close()
    shown = terminal.last().strip()
    assert shown.startswith("seed 1 BinaryRelax  60%|")
    assert "00:10 left, 00:10 so far, 4.00step/s, bits 2.68" in shown


def test_without_a_terminal_there_are_lines_only(capsys):
    progress = Progress(100)
    progress.figures("seed 1 BinaryRelax", bits=2.6789)
    progress.advance(40)
    progress.line("epoch 1")
    progress.close()
    assert capsys.readouterr() == ("epoch 1\n", "")


def test_quiet_has_no_bar_on_a_terminal_either(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = Progress(100, quiet=True)
    progress.advance(40)
    progress.close()
    assert terminal.getvalue() == ""
