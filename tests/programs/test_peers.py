"""The comparison with other libraries, without them."""

import importlib.util

import pytest

from benchmarks import peers

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_our_rows(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", {"jax": "there"}.get)
    for name, value in {"STEPS": 40, "SEEDS": (0,), "TURNS": 1, "STEPS_A_TURN": 1}.items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr("sys.argv", ["benchmarks.peers"])
    peers.main()
    shown = capsys.readouterr().out
    rows = [line.rsplit(maxsplit=4) for line in shown.splitlines() if "brelax_jax" in line]
    assert [values for _, _, values, _, _ in rows] == ["2", "3", "15"]
    assert all(float(accuracy) > 80 for _, accuracy, *_ in rows)
    assert "Not installed: qwix, torchao." in shown
