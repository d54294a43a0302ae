"""The arithmetic of the accuracy benchmark's tables, on results that were never trained."""

import pytest

from benchmarks.accuracy.records import Results
from benchmarks.accuracy.runs import METHODS, make_run
from tests.helpers.tiny_grid import PAGE, RESULTS, RUNS, TINY_BASE, grid, table_of

VALIDATION = ("validation_deployed", "validation_current")
REPORT = ["--report", "--seeds", "0", "1", "2", "--methods", *METHODS]


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


def made(method, accuracies, diverged=(), **changes):
    """Lines of runs that were never trained, with these accuracies by seed."""
    for seed, value in enumerate(accuracies):
        run = make_run(TINY_BASE, method or "parq", "binary", seed, 2, changes, str(RUNS))
        run = run if method else run.start
        record = {
            "name": run.name,
            "revision": run.revision,
            "method": run.method,
            "settings": run.settings,
            "versions": {"jax": "1"},
            "device": "cpu:0",
            "seconds": 1.0,
            "diverged": seed in diverged,
            "test_deployed": value / 100,
            "test_current": value / 100,
            "bits_per_weight": 1.0,
            "curve": {"loss": [1.0, 1.0], **{key: [0.1, value / 100] for key in VALIDATION}},
        }
        Results(RESULTS).add(record)


def test_the_tables_arithmetic(capsys):
    """By hand: differences of 2, 1 and 3 have a deviation of 1; the gap of 8 to the start is closed
    by a quarter. PARQ lacks a seed, so that it is compared over two.
    """
    made(None, [79, 80, 81])
    made("float-continued", [83, 84, 85])
    made("binary_connect", [70, 72, 74])
    made("binary_relax", [72, 73, 77])
    made("parq", [71, 72])
    made("proxquant", [70, 75, 80], diverged=[1])
    assert grid(*REPORT) == 0
    printed = capsys.readouterr().out
    start, further, connect, relax, parq, prox = table_of(printed)
    assert (start["method"], start["test accuracy"]) == ("float, where all start", "80.00 ± 1.00")
    assert further["test accuracy"] == "84.00 ± 1.00"
    assert connect["test accuracy"] == "72.00 ± 2.00"
    assert connect["minus BinaryConnect"] == "–"
    assert relax["test accuracy"] == "74.00 ± 2.65"
    assert (relax["n"], relax["by seed"]) == ("3", "0: 72.00, 1: 73.00, 2: 77.00")
    assert relax["minus BinaryConnect"] == "+2.00 ± 0.58 (n = 3)"
    assert relax["of the gap to the start"] == "25%"
    assert relax["of the gap to float, as long"] == "17%"
    assert (parq["n"], parq["test accuracy"]) == ("2", "71.50 ± 0.71")
    assert parq["minus BinaryConnect"] == "+0.50 ± 0.50 (n = 2)"
    assert parq["of the gap to the start"] == "6%"  # 1 of 9 + 8
    assert (prox["test accuracy"], prox["n"]) == ("diverged (1 of 3)", "3")
    assert prox["by seed"] == "0: 70.00, 1: diverged, 2: 80.00"
    assert {prox[name] for name in prox if "gap" in name or "minus" in name} == {"–"}
    assert "Not there yet (1 of 15): binary-parq-2ep-seed2." in printed


def test_the_study_compares_what_differs_in_one_thing(capsys):
    made(None, [80])
    made("binary_connect", [70, 72])
    made("binary_connect", [73, 74, 75], lr=0.3)
    made("binary_relax", [71, 74])
    made("binary_relax", [74, 77, 77], lr=0.3)
    assert grid("--study") == 0
    rows = {row.pop("runs"): row for row in table_of(capsys.readouterr().out)}
    assert PAGE.read_text().count("| runs |") == 1
    connect, relax = "binary-binary_connect-2ep", "binary-binary_relax-2ep"
    compared = ["minus without changes", "minus BinaryConnect"]
    assert rows.keys() == {"float", connect, f"{connect}-lr0.3", relax, f"{relax}-lr0.3"}
    assert rows[relax]["validation accuracy"] == rows[relax]["not deployed"] == "72.50 ± 2.12"
    assert [rows[relax][name] for name in compared] == ["–", "+1.50 ± 0.50 (n = 2)"]
    assert [rows[f"{relax}-lr0.3"][name] for name in compared] == [
        "+3.00 ± 0.00 (n = 2)",
        "+2.00 ± 0.58 (n = 3)",
    ]
    assert rows[f"{connect}-lr0.3"][compared[0]] == "+2.50 ± 0.50 (n = 2)"
    assert {rows[name][c] for name in ("float", connect) for c in compared} == {"–"}
    assert rows[relax]["test accuracy"] == "72.50 ± 2.12"


def test_changes_beside_a_start_and_a_learning_rate_are_compared_without_them(capsys):
    scratch = {"warm_start": None, "lr": 0.3}
    made("binary_connect", [60, 62], **scratch)
    made("binary_connect", [61, 62], **scratch, average=1.0)
    made("binary_relax", [63, 65], **scratch, lam_schedule="linear")
    made("binary_relax", [64, 68], **scratch, lam_schedule="linear", hard_from=0.5)
    made("binary_relax", [70, 72])
    assert grid("--study") == 0
    rows = {row.pop("runs"): row for row in table_of(capsys.readouterr().out)}
    end = [name for name in rows if name.endswith("hard_from0.5-lr0.3")]
    changed = rows[end[0]]
    assert changed["minus without changes"] == "+2.00 ± 1.00 (n = 2)"
    assert changed["minus BinaryConnect"] == "+5.00 ± 1.00 (n = 2)"
    average = rows["binary-binary_connect-2ep-scratch-lr0.3-average1"]
    assert average["minus without changes"] == "+0.50 ± 0.50 (n = 2)"


def test_without_a_gap_no_share_is_closed(capsys):
    made(None, [70])
    made("binary_connect", [70])
    made("binary_relax", [71])
    assert grid(*REPORT) == 0
    relax = table_of(capsys.readouterr().out)[-1]
    assert relax["of the gap to the start"] == relax["of the gap to float, as long"] == "–"
    assert relax["minus BinaryConnect"] == "+1.00 (n = 1)"


def test_a_report_of_nothing_says_so(capsys):
    for option in ("--report", "--study"):
        assert grid(option) == 2
        assert "There is no line" in capsys.readouterr().err
