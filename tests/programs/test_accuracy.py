"""The accuracy grid: what interrupts it, what it refuses, and what it writes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy.grid import claimed
from benchmarks.accuracy.records import Results
from examples.runs import studies
from examples.runs.log import read
from examples.runs.studies import sha256_of_json
from examples.train import loop
from tests.helpers import forked
from tests.helpers.killed import change
from tests.helpers.tiny_grid import (
    CONNECT,
    PAGE,
    PARQ,
    RESULTS,
    RUNS,
    START,
    TINY_BASE,
    drop,
    grid,
    lines,
    plan,
    study_of,
    table_of,
)


def results(directory="."):
    """The lines by name, without what the clock has a part in."""
    records = Results(directory / RESULTS).every()
    return {r["name"]: {k: v for k, v in r.items() if k != "seconds"} for r in records}


@pytest.fixture(scope="module", autouse=True)
def cache(quickly_compiled, traced_once):
    return quickly_compiled


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a grid that was not interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert grid() == 0
    return directory


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def done(whole, empty):
    """A copy of the grid as the working directory."""
    shutil.copytree(whole, ".", dirs_exist_ok=True)


@pytest.fixture
def trained(monkeypatch):
    """The epochs that are trained from here on, and when the data is loaded."""
    found = []
    epoch, load = loop.train_epoch, accuracy.load

    def train_epoch(trainer, state, number, *rest):
        found.append((Path(trainer.config.out).name, number))
        return epoch(trainer, state, number, *rest)

    def load_data(*args, **kwargs):
        found.append("data")
        return load(*args, **kwargs)

    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    monkeypatch.setattr(accuracy, "load", load_data)
    return found


# Interruptions.


def test_what_was_killed_and_interrupted_goes_on(
    whole, empty, trained, tmp_path_factory, monkeypatch
):
    """By SIGKILL while a checkpoint is saved; then between a run's result and its line."""
    printed = tmp_path_factory.mktemp("killed")
    status = forked.run(printed, killed, f"os.rename .*{CONNECT}.*/2[.]")
    assert status == -signal.SIGKILL, (printed / "printed").read_text()[-2000:]
    assert list(results()) == [START]
    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", interrupt)
        assert grid() == 130
    assert trained == ["data", (CONNECT, 2)]
    assert list(results()) == [START]
    trained.clear()
    assert grid() == 0
    assert trained == ["data", (PARQ, 1), (PARQ, 2)]
    assert results() == results(whole)


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_lines_suffice(done, trained):
    shutil.rmtree(RUNS)
    assert grid() == 0
    assert trained == []
    assert not RUNS.exists()


def test_a_start_whose_weights_are_gone_is_trained_again(whole, done, trained):
    """And its line left as it is."""
    before = study_of(START).read_bytes()
    shutil.rmtree(RUNS)
    drop(CONNECT)
    assert grid() == 0
    assert trained == ["data", (START, 1), (CONNECT, 1), (CONNECT, 2)]
    assert study_of(START).read_bytes() == before
    assert results() == results(whole)


@pytest.mark.parametrize("name", [PARQ, START])
def test_what_another_process_is_at_work_on_is_left_to_it(done, trained, capsys, name):
    """Nor does a run start from a start that is not there yet."""
    for each in {PARQ, name}:
        drop(each)
    (run,) = plan("--methods", "parq")
    with claimed(run if name == PARQ else run.start) as ours:
        assert ours
        assert grid("--methods", "parq") == 0
        printed = capsys.readouterr().out
        assert f"{name}: another process is at work on it" in printed
        assert f"0 of 1 runs are done.\nAt work elsewhere: {PARQ}" in printed
        assert PARQ not in lines()
    assert grid("--methods", "parq") == 0
    assert PARQ in lines()
    assert trained == []


def test_the_budget_says_what_is_missing(done, capsys):
    drop(PARQ)
    (RUNS / PARQ / "log.jsonl").unlink()
    shutil.rmtree(RUNS / PARQ / "checkpoints" / "2")
    seconds = [
        line["seconds"]
        for name in (START, CONNECT)
        for line in read(RUNS / name / "log.jsonl")
        if line["kind"] == "epoch"
    ]
    assert grid("--budget", "--sets", "binary", "ternary") == 0
    printed = capsys.readouterr().out
    assert re.findall(r"(\S+) +(\d/\d) +(.*)\n", printed) == [
        (START, "1/1", "done"),
        (CONNECT, "2/2", "done"),
        (PARQ, "1/2", "half done"),
        (CONNECT.replace("binary-", "ternary-", 1), "0/2", "missing"),
        (PARQ.replace("binary-", "ternary-", 1), "0/2", "missing"),
    ]
    assert "5 runs of 9 epochs, 5 of them missing" in printed
    assert f"at {np.median(seconds):.1f} s an epoch" in printed


# Lines.


def test_a_line_holds_what_the_log_does(whole):
    (run,) = plan("--methods", "parq")
    record = Results(whole / RESULTS).find(run)
    lines = read(whole / RUNS / PARQ / "log.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    for name in ("loss", "strength", "validation_deployed", "validation_current"):
        assert record["curve"][name] == [line[name] for line in epochs]
    for name in ("test_deployed", "test_current", "bits_per_weight"):
        assert record[name] == lines[-1][name]
    assert record["revision"] == 1
    assert record["versions"] == lines[0]["versions"]
    assert record["settings"].items() <= {**lines[0]["config"], "warm_start": START}.items()
    assert record["diverged"] is False
    assert not {"out", "mesh", "tensorboard"} & record["settings"].keys()
    sizes = {layer["path"]: layer["weights"] for layer in lines[-1]["layers"]}
    assert len(set(sizes.values())) > 1
    metrics = [line["layers"] for line in lines if line["kind"] == "metrics"]
    for name in ("distance", "flips"):
        means = [
            sum(n * m[p][name] for p, n in sizes.items()) / sum(sizes.values()) for m in metrics
        ]
        np.testing.assert_allclose(record["curve"][name], means, rtol=1e-3)
    assert record["curve"]["strength"][-1] == 1


def altered(name, change):
    """Changes a line as a hand would, but for the SHA-256; returns the number of the line."""
    path = study_of(name)
    texts = path.read_text().splitlines()
    number = next(i for i, text in enumerate(texts) if f'"name": "{name}"' in text)
    texts[number] = change(texts[number])
    path.write_text("\n".join(texts) + "\n")
    return number + 1


def rewritten(name, change):
    """Changes a line as if it had been written so."""
    record = drop(name)
    change(record)
    Results(RESULTS).add(record)


@pytest.mark.parametrize("more", [[], ["--report"]])
def test_a_line_of_other_settings_is_refused(done, trained, capsys, more):
    rewritten(CONNECT, lambda record: record["settings"].update(lr=0.2))
    assert grid(*more) == 2
    error = capsys.readouterr().err
    assert f"{study_of(CONNECT)}: {CONNECT} is of other settings" in error
    assert "lr: 0.2 there, 0.1 here" in error
    assert trained == []


def test_a_grid_of_another_base_is_refused(done, trained, capsys):
    assert grid(base=dataclasses.replace(TINY_BASE, momentum=0.5)) == 2
    error = capsys.readouterr().err
    assert START in error or CONNECT in error
    assert "momentum: 0.9 there, 0.5 here" in error
    assert grid("--study", base=dataclasses.replace(TINY_BASE, momentum=0.5)) == 2
    assert "binary-binary_connect-2ep-momentum0.9-seed0" in capsys.readouterr().err
    assert trained == []


@pytest.mark.parametrize("more", ["--report", "--study"])
@pytest.mark.parametrize("number", ["test_deployed", "sha256", None])
def test_an_altered_line_is_refused(done, capsys, more, number):
    def change(text):
        return text[:200] if number is None else json.dumps(json.loads(text) | {number: 0.99})

    path = study_of(PARQ)
    line = altered(PARQ, change)
    assert grid(more) == 2
    error = capsys.readouterr().err
    assert f"{path}, line {line} ({PARQ})" in error
    assert ("cannot be read" if number is None else "has been altered") in error


def test_a_line_under_another_name_is_refused(done, capsys):
    other = PARQ.replace("parq", "proxquant")
    rewritten(PARQ, lambda record: record.update(name=other))
    assert grid("--study") == 2
    assert f"{other} is of other settings: they give the name {PARQ}" in capsys.readouterr().err


def test_a_line_in_another_study_is_refused(done, capsys):
    study_of(PARQ).rename(RESULTS / "3ep.jsonl")
    assert grid("--study") == 2
    assert f"{RESULTS / '3ep.jsonl'}: {CONNECT} belongs in" in capsys.readouterr().err


def test_a_log_of_other_settings_is_refused(done, capsys):
    drop(PARQ)
    log = RUNS / PARQ / "log.jsonl"
    log.write_text(log.read_text().replace('"lr": 0.1,', '"lr": 0.2,', 1))
    assert grid() == 2
    error = capsys.readouterr().err
    assert str(log) in error
    assert "lr: 0.2 there, 0.1 here" in error


def test_a_line_from_before_a_setting_was_there_counts(done, trained):
    rewritten(PARQ, lambda record: record["settings"].pop("lam_steepness"))
    assert grid() == 0
    assert trained == []


def test_a_run_that_diverges_is_reported(done, capsys):
    wild = ["--methods", "binary_relax", "--override", "lr=1e30"]
    assert grid(*wild) == 0
    record = lines()["binary-binary_relax-2ep-lr1e+30-seed0"]
    assert record["diverged"] is True
    assert "nan" in record["curve"]["loss"]
    capsys.readouterr()
    assert grid(*wild, "--report") == 0
    (row,) = table_of(capsys.readouterr().out)[1:]
    assert (row["method"], row["test accuracy"]) == ("BinaryRelax", "diverged (1 of 1)")
    assert row["by seed"] == "0: diverged"
    assert grid("--study") == 0
    assert "| diverged (1 of 1) |" in capsys.readouterr().out


# JSON files of one run each, as earlier versions wrote them.


def as_file(record, name=None):
    """Such a file of a line, which had no revision."""
    record = {name: value for name, value in record.items() if name != "revision"}
    path = RESULTS / f"{name or record['name']}.json"
    path.write_text(json.dumps({**record, "sha256": sha256_of_json(record)}, indent=1))
    return path


@pytest.mark.parametrize("name", [PARQ, START])
def test_a_file_of_one_run_becomes_a_line(done, trained, name):
    before = lines()
    path = as_file(drop(name))
    assert grid("--budget") == 0
    assert not path.exists()
    assert lines() == before
    as_file(before[name])  # as if the process had been killed before it was removed
    assert grid() == 0
    assert not path.exists()
    assert lines() == before
    assert trained == []


@pytest.mark.parametrize(
    ("name", "found", "put", "message"),
    [
        (PARQ, '"diverged": false', '"diverged": false', f"holds another line of {PARQ}"),
        (PARQ, '"diverged": false', '"diverged": true', "altered since it was written"),
        (PARQ, '"settings"', '"set"', "not the JSON of a run"),
        (PARQ.replace("parq", "proxquant"), "", "", "altered since it was written"),
    ],
)
def test_a_file_of_one_run_that_cannot_be_right_is_refused(done, capsys, name, found, put, message):
    line = lines()[PARQ]
    path = as_file(line | {"seconds": line["seconds"] + 1}, name)
    path.write_text(path.read_text().replace(found, put))
    before = study_of(PARQ).read_bytes()
    for more in ([], ["--report"], ["--study"]):
        assert grid(*more) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"Error: {path} is not taken up: ")
        assert message in error
    assert path.exists()
    assert study_of(PARQ).read_bytes() == before


# Revisions of the algorithm.


def test_runs_of_another_revision_are_trained_again_and_not_mixed(
    done, trained, capsys, monkeypatch
):
    before = Results(RESULTS).every()
    monkeypatch.setattr(studies, "REVISION", 2)
    assert grid("--report", "--methods", "parq") == 0
    left_out = "Left out, because this is revision 2 of the algorithm"
    printed = capsys.readouterr().out
    assert [row["method"] for row in table_of(printed)] == ["float, where all start"]
    assert f"{left_out} (1): {PARQ} (revision 1)." in printed
    assert grid("--methods", "parq") == 0
    assert trained == ["data", (PARQ, 1), (PARQ, 2)]  # the float start counts
    assert (RUNS / "revision2" / PARQ).is_dir()
    after = Results(RESULTS).every()
    assert [record for record in after if record["revision"] != 2] == before
    (new,) = (record for record in after if record["revision"] == 2)
    assert new["name"] == PARQ
    capsys.readouterr()
    assert grid("--study") == 0
    printed = capsys.readouterr().out
    assert [row["runs"] for row in table_of(printed)] == ["binary-parq-2ep", "float"]
    assert f"{left_out} (2): {CONNECT} (revision 1), {PARQ} (revision 1)." in printed
    assert grid("--methods", "parq") == 0
    assert trained == ["data", (PARQ, 1), (PARQ, 2)]


# The page.


def test_the_report_takes_its_place_on_the_page(done):
    PAGE.parent.mkdir()
    PAGE.write_text("# Title\n\n<!-- 2ep: begin -->\nold\n<!-- 2ep: end -->\n\nConclusions.\n")
    for _ in range(2):
        assert grid("--report") == 0
    page = PAGE.read_text()
    assert page.startswith("# Title\n\n<!-- 2ep: begin -->\n| set |")
    assert page.endswith("<!-- 2ep: end -->\n\nConclusions.\n")
    assert "old" not in page
    pictures = re.findall(r"\]\((.*?)\)", page)
    assert len(pictures) == 3
    assert all((PAGE.parent / name).stat().st_size > 10_000 for name in pictures)


def killed(pattern):
    """Runs the grid; SIGKILL at the first change to a file that matches the pattern."""

    def hook(event, args):
        found = change(event, args, os.getcwd())
        if found and re.search(pattern, found):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return grid()
