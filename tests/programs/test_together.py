"""Runs that are trained together: what they compute, and what they leave."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks.accuracy import together
from benchmarks.accuracy.grid import claimed
from benchmarks.accuracy.records import Results
from benchmarks.accuracy.together import convolution_as_product, teams
from examples.runs.log import read
from tests.helpers.tiny_grid import RESULTS, RUNS, TINY_BASE, grid, plan

pytestmark = pytest.mark.usefixtures("quickly_compiled")
BASE = dataclasses.replace(
    TINY_BASE, augment=True, metrics_every=None, lr_schedule="restart", hold=0.5, average=1.0
)
ONE = ("--methods", "binary_relax", "--seeds", "1", "--learning-rates", "0.3")
OPTIONS = ("--methods", "binary_relax", "--seeds", "0", "1", "--learning-rates", "0.1", "0.3")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The directories of a run trained alone, and of a grid with it trained together."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for options in (ONE, (*OPTIONS, "--together")):
            found.append(tmp_path_factory.mktemp("grid"))
            patch.chdir(found[-1])
            assert grid(*options, base=BASE) == 0
    return found


def test_runs_trained_together_are_those_trained_alone(both):
    alone, jointly = ({r["name"]: r for r in Results(each / RESULTS).every()} for each in both)
    assert len(jointly) == 6  # the float starts of two seeds, and two learning rates of each
    assert {*alone} == {"float-seed1", "binary-binary_relax-2ep-lr0.3-seed1"}
    for name, record in alone.items():
        other = jointly[name]
        assert record.keys() == other.keys()
        assert other["settings"] == record["settings"]
        for column, values in record["curve"].items():
            within = 1e-3 if column in ("loss", "distance", "strength") else 0.05
            np.testing.assert_allclose(other["curve"][column], values, atol=within, rtol=1e-3)
    losses = {tuple(record["curve"]["loss"]) for record in jointly.values()}
    assert len(losses) == 6, "members that differ train differently"


def test_they_leave_the_same_log(both):
    for directory in (both[0] / RUNS).iterdir():
        alone, jointly = (read(each / RUNS / directory.name / "log.jsonl") for each in both)
        assert [line["kind"] for line in jointly] == [line["kind"] for line in alone]
        for one, other in zip(alone, jointly, strict=True):
            assert other.keys() - {"together"} == one.keys()
            if one["kind"] == "epoch":
                assert other["learning_rate"] == one["learning_rate"]
        assert alone[-1]["layers"] == jointly[-1]["layers"]


def test_a_team_that_is_done_is_not_trained_again(both, monkeypatch):
    monkeypatch.chdir(both[1])
    monkeypatch.setattr(together.Team, "start", None)
    assert grid(*OPTIONS, "--together", base=BASE) == 0


def test_a_start_that_another_process_trains_is_left_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(together.Team, "start", None)
    [run] = plan(*ONE, base=BASE)
    with claimed(run.start):
        assert grid(*ONE, "--together", base=BASE) == 0
    assert f"At work elsewhere: {run.name}" in capsys.readouterr().out
    assert not (tmp_path / RESULTS).exists()


def test_images_that_are_decoded_while_training_are_refused():
    data = dataclasses.make_dataclass("Data", ["train"])(train=object())
    with pytest.raises(ValueError, match="--together needs all images in memory: --override"):
        together.Team([BASE], data)


def test_teams_differ_in_more_than_seeds_and_learning_rates():
    runs = plan(*OPTIONS, "--sets", "binary", "ternary", base=BASE)
    found = teams(runs)
    assert [len(team) for team in found] == [4, 4]
    assert {run.config.set for run in found[0]} == {"binary"}
    assert {(run.config.seed, run.config.lr) for run in found[1]} == {
        (seed, lr) for seed in (0, 1) for lr in (0.1, 0.3)
    }
    scratch = plan(*OPTIONS, "--override", "warm_start=none", base=BASE)
    assert len(teams([*runs, *scratch])) == 3


def test_a_convolution_as_products():
    rng, shapes = np.random.default_rng(0), [(8, 3, 1), (8, 3, 2), (9, 1, 2), (9, 7, 2)]
    arrays = [
        (rng.normal(size=(6, side, side, 3)), rng.normal(size=(size, size, 3, 4)))
        for side, size, _ in shapes
    ]

    def gradients(convolve, **options):
        def loss(arrays):
            return sum(
                jnp.sum(jnp.sin(convolve(*each, (stride, stride), "SAME", **options)))
                for each, (_, _, stride) in zip(arrays, shapes, strict=True)
            )

        return jax.jit(jax.value_and_grad(loss))(jax.tree.map(np.float32, arrays))

    ours = gradients(convolution_as_product)
    theirs = gradients(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)
