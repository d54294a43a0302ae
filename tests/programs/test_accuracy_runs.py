"""The runs of the accuracy grid: their settings, their names, and names that are not known."""

from pathlib import Path

import pytest

from benchmarks.accuracy.runs import BASE, METHODS
from examples.train import cli
from tests.helpers.tiny_grid import CONNECT, PARQ, grid, plan


def test_the_float_start_is_what_the_training_program_makes_of_its_options():
    options = "--dataset cifar10 --model resnet8 --image-size 16 --epochs 15 --method float"
    out = "--metrics-every 0 --lam-schedule geometric --seed 3 --out runs/accuracy/float-seed3"
    (run,) = plan("--seeds", "3", "--methods", "parq", base=BASE)
    assert cli.parse([*options.split(), *out.split()])[0] == run.start.config
    assert run.config.warm_start == run.start.config.out


def test_all_but_the_method_is_equal():
    runs = plan("--methods", *METHODS, base=BASE)
    settings = [run.config.to_json() for run in runs]
    its_own = {"method", "out", "lam_schedule"}
    for theirs in settings:
        changed = {name for name in theirs if theirs[name] != settings[0][name]}
        assert changed <= its_own


def test_a_name_says_all_that_differs():
    changes = ["lr=0.03", "hard_from=1", "lr_drops=1,2", "lr_schedule=drops", "augment=true"]
    (run,) = plan("--methods", "parq", "--granularity", "block:8:0", "--override", *changes)
    changed = "augment-True-granularity-block_8_0-hard_from1-lr0.03-lr_schedule-drops-lr_drops1-2"
    assert run.name == f"binary-parq-2ep-{changed}-seed0"
    assert run.start.name == "float-augment-True-seed0"
    (scratch,) = plan("--methods", "parq", "--override", "warm_start=none")
    assert (scratch.name, scratch.start) == ("binary-parq-2ep-scratch-seed0", None)


@pytest.mark.parametrize(
    ("changes", "schedule", "said"),
    [
        ([], "linear", "-lam_schedule-linear"),
        (["lam_schedule=geometric"], "geometric", ""),
        (["lam_start=0.1"], "geometric", "-lam_start0.1"),
    ],
)
def test_from_scratch_the_strength_is_linear_unless_told(changes, schedule, said):
    options = ["--methods", "binary_relax", "--override", "warm_start=none", *changes]
    (run,) = plan(*options)
    assert run.config.lam_schedule == schedule
    assert run.name == f"binary-binary_relax-2ep-scratch{said}-seed0"


def test_no_name_means_two_things_when_a_methods_settings_change(monkeypatch):
    (before,) = plan("--methods", "parq")
    monkeypatch.setitem(METHODS, "parq", {"method": "parq", "lam_schedule": "linear"})
    (after,) = plan("--methods", "parq")
    assert before.name == PARQ
    assert after.name == "binary-parq-2ep-lam_schedule-linear-seed0"
    monkeypatch.setitem(METHODS, "parq", {"method": "parq", "hard_share": 0.4})
    (shared,) = plan("--methods", "parq", "--epochs", "10")
    assert shared.config.hard_from == 6


def test_settings_that_a_run_makes_no_use_of_make_no_other_run():
    changes = ["--override", "lam_start=2", "hard_from=1", "lam_schedule=linear"]
    connect, parq = plan(*changes)
    assert (connect.name, parq.name) == (
        CONNECT, "binary-parq-2ep-lam_schedule-linear-hard_from1-seed0",
    )  # fmt: skip
    (connect,) = plan("--methods", "binary_connect", "--override", "hard_from=1", "hard_lr=0.01")
    assert connect.name == "binary-binary_connect-2ep-hard_from1-hard_lr0.01-seed0"
    floats = plan("--methods", "float-continued", "--sets", "binary", "2bits")
    assert [run.name for run in floats] == ["float-continued-2ep-seed0"]


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ("--methods stochastic", "Known: float-continued, binary_connect, binary_relax, parq"),
        ("--sets octal", "Known: binary, ternary"),
        ("--granularity row", "Known: tensor, channel"),
        ("--override speed=3", "dataset, image_size"),
        ("--override lr", "lr, lr_schedule"),
        ("--override epochs=3", "NAME=VALUE with dataset"),
        ("--override lam_schedule=cubic", "Known: geometric, linear, cosine, sigmoid"),
        ("--override augment=perhaps", "Known: true, false"),
        ("--override model=resnet9", "resnet8, resnet20"),
        ("--override lr=fast", "Override lr: could not convert"),
        ("--override lr=-1", "--lr must be positive"),
        ("--override warm_start=runs/x", "only none"),
    ],
)
def test_unknown_names_list_the_known_ones(tmp_path, monkeypatch, capsys, options, known):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--report"]):
        assert grid(*options.split(), *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert known in error
    assert list(Path().iterdir()) == []
