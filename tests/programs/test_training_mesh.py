"""The training program on a mesh of devices: eight that the machine pretends to have.

JAX fixes their number when it starts, so a process trains on eight, and this one goes on with one;
in `make soak` two others with four and with two.
"""

import functools
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.runs.log import Log, read
from examples.train import __main__ as train
from examples.train import cli, loop
from examples.train.checkpoints import Checkpoints
from examples.train.data import load as data
from examples.train.steps import Trainer
from tests.helpers import forked
from tests.helpers.killed import TINY

SETTINGS = [
    *("--quiet", f"--model={TINY}", "--set=binary", "--granularity=channel", "--lr=0.02"),
    *("--epochs=2", "--batch=32", "--train-examples=96", "--statistics-batches=2"),
]
RUN = "BRELAX_RUN_ON_EIGHT"
MESH = "BRELAX_MESH_TO_GO_ON_WITH"


def process(devices: int, out: Path, mesh: str = "1x1") -> None:
    """Runs these tests where there are so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environ = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", RUN: str(out), MESH: mesh}
    options = ["-q", "-n0", "-p", "no:cacheprovider", __file__]
    status = forked.run(out.parent, pytest.main, options, **environ)
    assert status == 0, (out.parent / "printed").read_text()[-5000:]


@pytest.fixture(scope="module", autouse=True)
def cache(quickly_compiled, traced_once, undrawn):
    return quickly_compiled


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory) -> Path:
    """The directory of a run on eight devices."""
    if RUN in os.environ:
        return Path(os.environ[RUN])
    out = tmp_path_factory.mktemp("mesh") / "run"
    process(8, out)
    return out


@functools.cache
def trainer_on(mesh: str) -> Trainer:
    config, _ = cli.parse([*SETTINGS, "--mesh", mesh])
    return loop.Trainer(config, data.load("digits", None, config.validation, config.train_examples))


def restored(trainer: Trainer, out: Path):
    """The state in a run's last checkpoint, on the trainer's mesh."""
    like = trainer.abstract_state()
    _, state = Checkpoints(out).restore(like, trainer.config)
    for leaf, asked in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(asked.sharding, leaf.ndim)
    return state


def arrays(tree) -> dict[str, np.ndarray]:
    return {f"{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}


if jax.device_count() < 8:

    @pytest.mark.parametrize("mesh", [os.environ.get(MESH, "1x1")])
    def test_a_run_on_eight_devices_goes_on_with_fewer(mesh, on_eight, tmp_path):
        expected, trainer = np.load(on_eight / "arrays.npz"), trainer_on(mesh)
        for name, found in arrays(restored(trainer, on_eight)).items():
            assert found.dtype == expected[name].dtype
            assert found.tobytes() == expected[name].tobytes()
        out = tmp_path / "run"
        shutil.copytree(on_eight, out)
        shutil.rmtree(out / "checkpoints" / "2")
        state = restored(trainer, out)
        for batch in trainer.batches(2):
            state, _ = trainer.step(state, batch.images, batch.labels)
        for name, found in arrays(state).items():
            np.testing.assert_allclose(found, expected[name], rtol=1e-3, atol=1e-5)


if jax.device_count() == 1:

    @pytest.mark.soak
    @pytest.mark.parametrize("mesh", ["1x4", "2x1"])
    def test_with_four(mesh, on_eight):
        process(4, on_eight, mesh)

    def test_the_program_goes_on_with_one(on_eight, tmp_path):
        out = tmp_path / "run"
        shutil.copytree(on_eight, out)
        shutil.rmtree(out / "checkpoints" / "2")
        assert train.main(["--out", str(out), *SETTINGS, "--resume"]) == 0
        lines, theirs = read(Log(out).path), read(Log(on_eight).path)
        assert [line["kind"] for line in lines] == [line["kind"] for line in theirs]
        assert lines[:4] == theirs[:4]  # what was logged before it went on
        assert lines[-1]["layers"] == theirs[-1]["layers"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--mesh=4x2"], "--mesh 4x2 takes 8 devices, but here are 1."),
            (["--mesh=4"], "--mesh must be two numbers of devices, as in 4x2, got '4'"),
            (["--mesh=0x1"], "--mesh must be two numbers"),
        ],
    )
    def test_meshes_that_cannot_be(options, message, tmp_path, capsys):
        try:
            status = train.main(["--out", str(tmp_path / "run"), *SETTINGS, *options])
        except SystemExit as error:
            status = error.code
        assert status == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

elif jax.device_count() == 8:

    def test_a_run_on_eight_devices(on_eight):
        assert train.main(["--out", str(on_eight), *SETTINGS, "--mesh", "4x2"]) == 0
        np.savez(on_eight / "arrays.npz", **arrays(restored(trainer_on("4x2"), on_eight)))

    def test_kernels_lie_over_columns_and_batches_over_rows():
        trainer = trainer_on("4x2")
        state = trainer.init()
        relax = state.opt_state
        trace = relax.base_state[1][0].trace
        for tree in (state.params, relax.float_params, trace, relax.codes):
            kernel = tree["conv_1"]["kernel"]
            assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 4, 4)
        assert relax.scales["conv_1/kernel"].sharding.shard_shape((1, 1, 1, 8)) == (
            1,
            1,
            1,
            4,
        )
        for tree in (state.params["head"]["bias"], state.batch_stats, state.step, relax.count):
            assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree))
        batch = next(trainer.batches(1))
        compiled = trainer.step.lower(state, batch.images, batch.labels).compile()
        images = compiled.input_shardings[0][1]
        assert images.shard_shape(batch.images.shape)[0] == len(batch) // 4
        odd = trainer_on("1x8").abstract_state().params["head"]["kernel"]  # eight do not divide 10
        assert odd.sharding.is_fully_replicated

    def test_a_step_is_that_of_one_device():
        trainers = [trainer_on(mesh) for mesh in ("4x2", "1x1")]
        batches = list(trainers[0].batches(1))
        results = []
        for trainer in trainers:
            state = trainer.init()
            for batch in batches:
                state, sums = trainer.step(state, batch.images, batch.labels)
            some = trainer.data.test[np.arange(30)]  # 30 do not divide over four rows
            results.append(
                {
                    "state": state,
                    "sums": sums,
                    "metrics": trainer.metrics(state.opt_state, state.params),
                    "statistics": trainer.batch_statistics(state.params),
                    "accuracy": jnp.float32(trainer.evaluate(*state[1:3], some)),
                }
            )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)

    def test_a_batch_that_does_not_divide_is_refused():
        message = r"A batch of 32 does not divide over the 5 rows of --mesh 5x1"
        with pytest.raises(ValueError, match=message):
            trainer_on("5x1")
