"""The published experiments: what each is, and some steps of it on small or made data."""

import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import experiments
from examples.runs import report
from examples.runs.log import Log, read
from examples.runs.sets import parse_set
from examples.train import __main__ as train
from examples.train import cli, loop
from examples.train.checkpoints import Checkpoints
from examples.train.data import load as data
from examples.train.data.splits import Split
from examples.train.loop import deployed
from examples.train.models import make_model
from examples.train.optimizer import continuation, layer_sets, learning_rate
from examples.train.steps import Trainer
from tests.helpers import covering
from tests.helpers.killed import TINY
from tests.helpers.tiny_imagenet import Imagenet2012

# Counts as published (He et al., 2015; torchvision), in millions.
PARAMETERS = {
    "vgg16": 14.72,
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet56": 0.85,
    "resnet18": 11.69,
    "resnet50": 25.56,
}


@pytest.fixture(scope="module", autouse=True)
def cache(quickly_compiled, traced_once, undrawn):
    return quickly_compiled


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A directory with a tiny data set under ImageNet's name."""
    place = tmp_path_factory.mktemp("tfds")
    Imagenet2012(data_dir=place, file_format="array_record").download_and_prepare()
    return place


def config_of(name, *more):
    return cli.parse([*experiments.arguments(name), *more])[0]


# What they are.


def test_every_network_set_and_method_is_there():
    configs = {name: config_of(name) for name in experiments.NAMES}
    assert len(configs) == (4 + 6 + 2) * (1 + 5 * 3)
    assert len({config.directory for config in configs.values()}) == len(configs)
    for name, config in configs.items():
        assert name.startswith(f"{config.dataset}-{config.model}-")
        assert name.endswith(config.method)
        if config.method != "float":
            qset = parse_set(config.set, config.granularity)
            levels = {"binary": 2, "ternary": 3, "2bits": 4, "3bits": 7, "4bits": 15}
            assert len(qset.levels) == levels[name.split("-")[2]]
        start = config.warm_start  # the authors' start from a float run; that is one of these
        assert (start is not None) == ("vgg" in name and config.method != "float")
        if start is not None:
            assert start == configs[f"{config.dataset}-{config.model}-float"].directory


@pytest.mark.parametrize(
    ("name", "rates", "strengths"),
    [  # by epoch: the learning rate, and the strength of the pull
        (
            "cifar10-vgg11-binary-binary_relax",
            {79: 0.1, 81: 0.01, 141: 0.001},
            {0: 1.04 / 2.04, 149: 1.04**150 / (1 + 1.04**150)},
        ),
        (
            "cifar100-resnet56-2bits-binary_relax",
            {79: 0.1, 81: 0.01, 121: 0.001, 151: 0.0001},
            {0: 0, 75: 0.5, 120: 0.8, 150: 1},
        ),
        (
            "cifar10-resnet20-binary-parq",
            {79: 0.1, 81: 0.01, 121: 0.001, 151: 0.0001},
            {0: 0, 72: 1 / (1 + np.exp(2)), 75: 0.5, 78: 1 / (1 + np.exp(-2)), 150: 1},
        ),
        ("cifar10-resnet20-float", {99: 0.1, 101: 0.01, 151: 0.001}, {}),
        (
            "imagenet2012-resnet50-ternary-binary_relax",
            {29: 0.1, 31: 0.01, 61: 0.001},
            {0: 0, 45: 0.5, 81: 0.9, 90: 1},
        ),
        (
            "imagenet2012-resnet18-4bits-parq",
            {29: 0.1, 31: 0.01, 61: 0.001},
            {0: 0, 43.8: 1 / (1 + np.e), 45: 0.5, 46.2: 1 / (1 + 1 / np.e), 90: 1},
        ),
    ],
)
def test_schedules_are_the_published_ones(name, rates, strengths):
    config, steps = config_of(name), 100
    lr, lam = learning_rate(config, steps), continuation(config, steps)
    found = {epoch: float(lr(epoch * steps)) for epoch in rates}
    assert found == pytest.approx(rates, rel=1e-5)
    pulls = {e: 1 / (1 + 1 / np.float64(lam(round(e * steps)) or 1e-300)) for e in strengths}
    assert pulls == pytest.approx(strengths, abs=1e-3)
    decay = {"vgg": 1e-4, "res": 2e-4, "ima": 1e-4}
    assert config.weight_decay == decay[name[:3] if name.startswith("im") else config.model[:3]]


@pytest.mark.parametrize(
    "model", covering.some(sorted(PARAMETERS), ["vgg16", "resnet20", "resnet18"])
)
def test_parameters_are_those_of_the_papers(model):
    params = shapes(model, 1000 if model in ("resnet18", "resnet50") else 10)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, 2) == PARAMETERS[model]


@functools.cache
def shapes(model, classes):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(make_model(model, classes).init, jax.random.key(0), image)["params"]


def test_which_layers_are_quantized():
    """CIFAR by PARQ: every kernel; by the authors: not the classifier; ImageNet: blocks alone."""
    for name, kept in {
        "cifar10-resnet20-binary-parq": [],
        "cifar10-vgg11-binary-binary_relax": ["head/kernel"],
        "imagenet2012-resnet18-binary-parq": ["head/kernel", "stem/kernel"],
    }.items():
        config = config_of(name)
        params = shapes(config.model, 10)
        kernels = {path for path, leaf in report.leaves(params).items() if leaf.ndim > 1}
        assert kept == sorted(kernels - layer_sets(config).assign(params).keys())


# Their command lines.


def test_commands_are_printed(capsys):
    pattern = "imagenet2012-resnet50-ternary-*"
    more = ["--mesh", "8x1", "--dtype", "bfloat16"]
    assert experiments.main([pattern, "--seed", "3", *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "examples.train"]
        config = cli.parse(words[3:])[0]
        assert (config.mesh, config.dtype, config.seed) == ("8x1", "bfloat16", 3)
    assert experiments.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(experiments.NAMES)


def test_unknown_names_list_the_known(capsys):
    assert experiments.main(["cifar10-resnet18-*"]) == 2
    message = capsys.readouterr().err
    assert "no experiment is 'cifar10-resnet18-*'" in message
    for known in ("imagenet2012-resnet50", "cifar100-vgg16", "4bits", "binary_relax"):
        assert known in message
    with pytest.raises(ValueError, match=r"(?s)Unknown experiment 'resnet20'.*cifar10-resnet20"):
        experiments.arguments("resnet20")
    with pytest.raises(SystemExit):
        experiments.main(["cifar10-vgg11-float", "--precision", "16"])
    assert "--precision" in capsys.readouterr().err


def test_commands_of_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
    commands = re.findall(r"python -m examples\.experiments([^|\n]*)", text)
    assert len(commands) >= 3
    for command in commands:
        assert experiments.main(shlex.split(command, comments=True)) == 0
    assert set(re.findall(r"`(?:cifar|imagenet)[^`]*`", text)) <= {
        f"`{'-'.join(network)}`" for network in experiments.PRESETS
    }


# A step of each, on made data.

SMALL = ["--batch=4", "--epochs=1", "--hard-from=0.5", "--lr-drops=0.9", "--dtype=bfloat16"]


def trainer_of(name, side, *more):
    """The experiment's trainer, on eight random images."""
    config = config_of(name, *SMALL, *more)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, side, side, 3), np.uint8)
    split = Split(images, rng.integers(0, 10, 8).astype(np.int32))
    return Trainer(config, data.Data(split, split.part(np.arange(0)), split, 10))


def test_a_step_can_be_traced():
    trainer = trainer_of("imagenet2012-resnet18-binary-binary_relax", 64)
    state = trainer.abstract_state()
    batch = next(trainer.batches(1))
    after, sums = trainer.step.eval_shape(state, batch.images, batch.labels)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    assert all(jax.tree.leaves(same))
    assert sums.loss.dtype == jnp.float32


PAIRS = list(itertools.product(experiments.SETS, experiments.METHODS))


@pytest.mark.soak
@pytest.mark.parametrize(
    "name",
    [
        "-".join((*network, *PAIRS[i % len(PAIRS)]))
        for n, network in enumerate(experiments.PRESETS)
        for i in (2 * n, 2 * n + 1)
    ],
)
def test_two_steps_of_every_network_every_set_and_every_method(name):
    """Two steps, in bfloat16, the second of them in phase II: what is deployed is on its sets."""
    trainer = trainer_of(name, 32, "--lr=0.01")
    state = trainer.init()
    for batch in trainer.batches(1):
        state, sums = trainer.step(state, batch.images, batch.labels)
        assert np.isfinite(sums.mean_loss)
    params, statistics = deployed(trainer, state)
    layers = report.quantized_layers(params, layer_sets(trainer.config))
    assert layers
    for layer in layers:
        assert 2 <= layer.distinct <= layer.levels
    assert np.isfinite(trainer.evaluate(params, statistics, trainer.data.test))


# ImageNet's, on a tiny data set that is streamed.

RUN = [
    *("--quiet", f"--model={TINY}", "--image-size=16", "--stream=yes", "--dtype=bfloat16"),
    *("--batch=16", "--epochs=3", "--hard-from=2", "--lr-drops=2", "--statistics-batches=2"),
    "--metrics-every=0",
]


def run_of(out, *more):
    """The arguments of an ImageNet experiment made small."""
    name = "imagenet2012-resnet50-binary-binary_relax"
    return ["--out", str(out), *experiments.arguments(name)[:-2], *RUN, *more]


def last_state(arguments):
    config = cli.parse(arguments)[0]
    loaded = data.load(config.dataset, config.image_size, stream=config.stream)
    _, state = Checkpoints(config.directory).restore(
        loop.Trainer(config, loaded).abstract_state(), config
    )
    return state


@pytest.fixture(scope="module")
def whole_run(imagenet, tmp_path_factory):
    out = tmp_path_factory.mktemp("imagenet") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(imagenet))
        assert train.main(run_of(out)) == 0
    return out


def test_a_streamed_run_resumes_bit_for_bit(whole_run, imagenet, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(imagenet))
    lines = read(Log(whole_run).path)
    (layer,) = lines[-1]["layers"]  # the stem and the head are float
    assert layer["path"] == "conv_1/kernel"
    assert (layer["groups"], layer["distinct"]) == (8, 2)
    assert lines[0]["examples"] == 40
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    shutil.rmtree(out / "checkpoints" / "3")  # as if it had been killed in the third epoch
    assert train.main(run_of(out, "--resume")) == 0
    states = [last_state(run_of(place)) for place in (whole_run, out)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    for found, expected in zip(read(Log(out).path)[1:], lines[1:], strict=True):
        for clock in ("seconds", "images_per_second"):
            found.pop(clock, None), expected.pop(clock, None)
        assert found == expected


@pytest.mark.soak
def test_a_streamed_run_on_a_mesh(whole_run, imagenet, tmp_path, cache):
    """Two devices, which JAX fixes when it starts, and the same losses to rounding."""
    out = tmp_path / "run"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TFDS_DATA_DIR": str(imagenet)}
    command = [sys.executable, "-m", "tests.helpers.killed", "0", ".", *run_of(out, "--mesh=2x1")]
    subprocess.run(command, env=os.environ | cache | environment, check=True)
    losses = [
        [line["loss"] for line in read(Log(place).path) if line["kind"] == "epoch"]
        for place in (whole_run, out)
    ]
    np.testing.assert_allclose(*losses, rtol=0.02)  # bfloat16
