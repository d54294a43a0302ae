"""The training program: its messages, data, models, checkpoints and evaluations."""

import dataclasses
import json
import math
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from examples import demo
from examples.runs import events, plots, report
from examples.runs.log import Log, read
from examples.runs.progress import Progress
from examples.runs.sets import parse_set
from examples.train import __main__ as train
from examples.train import deploy, loop
from examples.train.checkpoints import Checkpoints
from examples.train.config import Config
from examples.train.data import load as data
from examples.train.loop import deployed, layer_metrics, run
from examples.train.models import MODELS, Cnn, make_model
from examples.train.optimizer import layer_sets
from examples.train.steps import Trainer
from tests.helpers import covering
from tests.helpers.killed import TINY as TINY_MODEL

SLIM = "slim"
NETWORKS = sorted({*MODELS} - {TINY_MODEL})
MODELS[SLIM] = partial(Cnn, widths=(8, 16, 16, 32))
TINY = Config(
    model=SLIM, epochs=2, batch=32, train_examples=256, validation=0.2, statistics_batches=2,
    checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compile_once(quickly_compiled, traced_once):
    """The runs here are many and alike."""
    return quickly_compiled


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits", validation=0.2, train_examples=256)


@pytest.fixture(scope="module")
def float_run(digits, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("runs") / "float")
    run(dataclasses.replace(TINY, method="float", out=out), digits, Progress(0, quiet=True))
    return out


@pytest.fixture(scope="module")
def relaxed_run(digits, float_run, tmp_path_factory) -> Config:
    out = str(tmp_path_factory.mktemp("runs") / "binary")
    config = dataclasses.replace(
        TINY, epochs=4, checkpoint_every=3, set="binary", warm_start=float_run, out=out
    )
    loaded: list[float] = []

    def finish(trainer, state):
        loaded.append(deploy.loaded_accuracy(trainer, deploy.save(trainer, state)))

    result = run(config, digits, Progress(0, quiet=True), finish=finish)
    assert loaded == [result["test_deployed"]]
    return config


@pytest.fixture(scope="module")
def trainer(digits, relaxed_run) -> Trainer:
    return loop.Trainer(relaxed_run, digits)


@pytest.fixture
def state(trainer, relaxed_run):
    """As at the start of the run."""
    return loop.start(trainer, Checkpoints(relaxed_run.directory), relaxed_run, resume=False)[1]


# Models.


@pytest.mark.parametrize("name", covering.some(NETWORKS, ["cnn", "resnet8", "resnet50", "vgg11"]))
def test_models(name):
    shortcuts = {"resnet18": 3, "resnet50": 4}
    side, channels = (8, 1) if name == "cnn" else (224 if name in shortcuts else 32, 3)
    model = make_model(name, 7, "bfloat16")
    images = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert layer_sets(Config()).assign(variables["params"])  # there are a stem and a head
    kernels = [leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim > 1]
    digits = "".join(filter(str.isdigit, name.removesuffix("x2")))
    expected = {"cnn": 5, "vgg11": 9, "vgg16": 14}.get(name) or int(digits) + shortcuts.get(name, 0)
    assert len(kernels) == expected


def test_unknown_model_lists_the_known():
    with pytest.raises(
        ValueError, match=r"Unknown model 'resnet9'\. Known: cnn, resnet18, .*vgg16"
    ):
        make_model("resnet9", 10)


# Runs.


def test_a_run_ends_on_the_set_and_logs_both_evaluations(relaxed_run):
    lines = read(Log(relaxed_run.directory).path)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    result = lines[-1]
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4]
    assert all(
        {"validation_current", "validation_deployed", "lam", "strength"} <= line.keys()
        for line in epochs
    )
    assert [line["lam"] == "inf" for line in epochs] == [False, False, False, True]
    assert lines[0]["config"] == relaxed_run.to_json()
    assert result["kind"] == "result"
    assert [layer["distinct"] for layer in result["layers"]] == [2] * 4
    assert 1 < result["bits_per_weight"] < 1.1
    assert result["test_deployed"] > 0.5


def test_deployed_params_are_projected_and_have_statistics_of_their_own(trainer, state):
    for batch in trainer.batches(1):
        state, _ = trainer.step(state, batch.images, batch.labels)
    params, statistics = deployed(trainer, state)
    assert len(np.unique(state.params["conv_2"]["kernel"])) > 1000
    assert len(np.unique(params["conv_2"]["kernel"])) == 2
    np.testing.assert_array_equal(params["head"]["kernel"], state.params["head"]["kernel"])
    moments = [
        trainer._statistics(params, b.images, jnp.int32(i + 1))
        for i, b in zip(range(2), trainer.batches(0), strict=False)
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *jax.device_get(moments))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), statistics, mean
    )
    assert not np.allclose(
        statistics["BatchNorm_2"]["mean"], state.batch_stats["BatchNorm_2"]["mean"], rtol=0.05
    )


def test_metrics_are_of_the_layers_that_the_run_ended_with(trainer, relaxed_run):
    lines = [line for line in read(Log(relaxed_run.directory).path) if line["kind"] == "metrics"]
    assert [line["step"] for line in lines] == [8, 16, 24, 32]  # once an epoch, unless told
    _, state = Checkpoints(relaxed_run.directory).restore(trainer.abstract_state(), relaxed_run)
    floats = report.leaves(brx.float_params(state.opt_state, state.params))
    assert len(lines[-1]["layers"]) == 4
    for path, values in lines[-1]["layers"].items():
        y, q = np.asarray(floats[path]), np.asarray(report.leaves(state.params)[path])
        positive = np.mean(q > 0)
        assert values["levels"] == [-1, 1]
        np.testing.assert_allclose(values["occupancy"], [1 - positive, positive], rtol=1e-5)
        np.testing.assert_allclose(values["scale"], q.max(), rtol=1e-5)
        np.testing.assert_allclose(
            values["distance"], np.linalg.norm(y - q) / np.linalg.norm(y), rtol=1e-4
        )
        assert (values["lam"], values["strength"]) == ("inf", 1)


def test_flips_are_the_signs_that_a_step_changes(trainer, state):
    for batch in [*trainer.batches(1)][:3]:
        before = report.leaves(brx.float_params(state.opt_state, state.params))
        before = {path: np.array(y) >= 0 for path, y in before.items()}
        state, _ = trainer.step(state, batch.images, batch.labels)
    after = report.leaves(brx.float_params(state.opt_state, state.params))
    layers = layer_metrics(trainer, state)
    shares = {path: np.mean((np.array(after[path]) >= 0) != before[path]) for path in layers}
    assert min(shares.values()) > 0
    assert {path: values["flips"] for path, values in layers.items()} == pytest.approx(shares)


def test_without_metrics_nothing_is_tracked_or_drawn(digits, float_run, relaxed_run, tmp_path):
    def bytes_of(**changes):
        state = Trainer(dataclasses.replace(relaxed_run, **changes), digits).abstract_state()
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    kernels = 72 + 1152 + 2304 + 4608
    tracked = bytes_of() - bytes_of(metrics_every=0)
    assert tracked == pytest.approx(kernels, rel=1e-3)  # a byte a weight
    assert not dataclasses.replace(TINY, metrics_every=0).metrics_due(16, steps_per_epoch=8)
    assert plots.plot_metrics(float_run, tmp_path / "metrics.png") is None
    assert not (tmp_path / "metrics.png").exists()
    assert not list(Path(relaxed_run.directory).glob(events.FILES))  # nor asked for


def test_evaluation_counts_each_image_once(trainer, state, digits):
    few = digits.test
    accuracy = trainer.evaluate(state.params, state.batch_stats, few)
    assert round(accuracy * 450, 5) == round(accuracy * 450)
    assert 0 < accuracy < 1, "there is nothing to test"
    many = few[np.tile(np.arange(450), 2)]  # 900: two parts
    assert trainer.evaluate(state.params, state.batch_stats, many) == pytest.approx(accuracy)


def test_a_resumed_run_is_the_uninterrupted_one(trainer, digits, relaxed_run, tmp_path):
    interrupted = dataclasses.replace(relaxed_run, out=str(tmp_path / "run"))
    shutil.copytree(relaxed_run.directory, interrupted.directory)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")  # as if it had ended after epoch 3
    run(interrupted, digits, Progress(0, quiet=True), resume=True)
    states = [restored(config, trainer) for config in (relaxed_run, interrupted)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    logs = [steady(read(Log(config.directory).path)) for config in (relaxed_run, interrupted)]
    assert logs[0] == logs[1]


def test_a_damaged_checkpoint_is_passed_over(trainer, digits, relaxed_run, tmp_path, capsys):
    config = dataclasses.replace(relaxed_run, out=str(tmp_path / "run"))
    shutil.copytree(relaxed_run.directory, config.directory)
    for path in (tmp_path / "run" / "checkpoints" / "4" / "rest").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(config, digits, Progress(0, quiet=True), resume=True)
    printed = capsys.readouterr().out
    assert "checkpoints/4 is damaged" in printed
    assert "epoch   4/4" in printed
    assert "epoch   3/4" not in printed
    jax.tree.map(
        np.testing.assert_array_equal, restored(relaxed_run, trainer), restored(config, trainer)
    )


def test_another_configuration_is_refused_with_the_difference(digits, relaxed_run):
    other = dataclasses.replace(relaxed_run, lr=0.05, set="uniform3")
    with pytest.raises(
        ValueError, match=r"(?s)lr: 0\.1 there, 0\.05 here.*set: 'binary' there, 'uniform3' here"
    ):
        run(other, digits, Progress(0, quiet=True), resume=True)


def test_a_directory_in_use_is_refused(digits, relaxed_run):
    before = Log(relaxed_run.directory).path.read_text()
    with pytest.raises(ValueError, match="--resume"):
        run(relaxed_run, digits, Progress(0, quiet=True))
    assert Log(relaxed_run.directory).path.read_text() == before


def test_warm_start(trainer, digits, float_run, tmp_path):
    config = dataclasses.replace(TINY, warm_start=float_run, out=str(tmp_path))
    model = Checkpoints(float_run).restore_model(trainer.abstract_state(), config)
    lines = read(Log(float_run).path)
    assert trainer.evaluate(**model, split=digits.test) == pytest.approx(
        lines[-1]["test_current"], abs=1e-6
    )
    with pytest.raises(
        ValueError, match=r"(?s)another network.*model: 'slim' there, 'resnet8' here"
    ):
        Checkpoints(float_run).restore_model(
            trainer.abstract_state(), dataclasses.replace(config, model="resnet8")
        )
    with pytest.raises(ValueError, match="no run to start from"):
        run(
            dataclasses.replace(config, warm_start=str(tmp_path / "none")),
            digits,
            Progress(0, quiet=True),
        )


def test_the_program_and_its_pictures(tmp_path, capsys):
    out = str(tmp_path / "run")
    options = [
        "--preset",
        "quick",
        f"--model={TINY_MODEL}",
        "--epochs=1",
        "--train-examples=128",
        "--quiet",
        "--granularity=channel",
        "--method=binary_connect",
    ]
    assert train.main([*options, "--out", out, "--hard-from=0"]) == 0
    printed = capsys.readouterr().out
    assert "stem/kernel" in printed
    assert "deployed" in printed
    for picture in ("run.png", "metrics.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 10_000
    assert train.main([*options, "--out", out]) == 2
    assert "--resume" in capsys.readouterr().err


def test_distinct_values_are_counted_in_each_scale_group():
    params = {"conv": {"kernel": jnp.array([[1.0, 5.0], [-1.0, 5.0], [1.0, 6.0], [1.0, 7.0]])}}
    selection = brx.select(default=brx.Binary(granularity=brx.PerChannel()))
    (layer,) = report.quantized_layers(params, selection)
    assert (layer.distinct, layer.groups, layer.weights, layer.bits) == (3, 2, 8, 1 + 32 * 2 / 8)


@pytest.mark.parametrize(
    ("word", "bits"),
    [
        ("tq2_0", math.log2(3) + 16 / 256),
        ("q4_0", math.log2(15) + 16 / 32),
        ("mxfp4", math.log2(15) + 8 / 32),
        ("nvfp4", math.log2(15) + 8 / 16),
    ],
)
def test_scales_are_counted_in_their_dtype(word, bits):
    params = {"kernel": np.ones((256, 2), np.float32)}
    layers = report.quantized_layers(params, brx.select(default=parse_set(word)))
    assert report.bits_per_weight(layers) == pytest.approx(bits)


def test_logs_keep_infinity_and_leave_out_half_a_line(tmp_path):
    log = Log(tmp_path)
    log.start(TINY.to_json())
    log.write("epoch", epoch=1, lam=float("inf"), loss=np.float32(0.1234567))
    with log.path.open("a") as file:
        file.write('{"kind": "epo')
    assert read(log.path)[1:] == [{"kind": "epoch", "epoch": 1, "lam": "inf", "loss": 0.123457}]
    log.cut(0)
    assert [json.loads(line)["kind"] for line in log.path.read_text().splitlines()] == ["header"]


def test_the_demo_starts_every_quantized_run_from_the_float_one():
    runs = demo.configs("out", 3)
    assert list(runs) == [
        "float",
        *(f"{m} {s}" for s in ("binary", "ternary") for m in ("BinaryConnect", "BinaryRelax")),
    ]
    assert {config.warm_start for config in runs.values()} == {None, runs["float"].out}
    assert len({config.directory for config in runs.values()}) == 5


def test_plots_of_several_runs(float_run, relaxed_run, tmp_path):
    path = plots.plot_runs({"binary": relaxed_run.directory}, tmp_path / "runs.png", float_run)
    assert path.read_bytes().startswith(b"\x89PNG")


def restored(config: Config, trainer: Trainer):
    """The last checkpoint's arrays."""
    found = Checkpoints(config.directory).restore(trainer.abstract_state(), config)
    assert found is not None
    assert found[0] == config.epochs
    return jax.tree.leaves(found[1])


def steady(lines):
    """What of a log does not depend on the clock or the directory."""
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "config")}
        for line in lines
    ]
