"""The language model example: model, networks, what a run keeps, and what it refuses."""

import copy
import dataclasses
import math
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from examples.language_model import __main__ as language_model
from examples.language_model import text
from examples.language_model.config import Settings
from examples.language_model.networks import networks, rules
from examples.language_model.report import row, spread
from examples.language_model.seeds import Seed, measured
from examples.language_model.trainer import Trained, Trainer
from examples.runs import studies
from examples.runs.progress import Progress
from examples.runs.studies import Study
from tests.helpers import oracles
from tests.helpers.made_text import made_text

TINY = Settings(
    width=8,
    layers=1,
    heads=2,
    context=8,
    batch=4,
    steps=20,
    further_steps=20,
    warmup=2,
    sets=("ternary",),
)
OPTIONS = [
    f"--{name.replace('_', '-')}={value[0] if name == 'sets' else value}"
    for name, value in vars(TINY).items()
]
LAYERS = {"query": (8, 8), "key": (8, 8), "value": (8, 8), "out": (8, 8)}
LAYERS |= {"gate": (8, 24), "up": (8, 24), "down": (24, 8)}
KERNELS = {f"block_0/{name}/kernel" for name in LAYERS}


@pytest.fixture(scope="module")
def made():
    return text.encode(made_text(2000, 0), made_text(150, 1), made_text(150, 2))


@pytest.fixture(scope="module")
def trainer(made, quickly_compiled):
    return Trainer(TINY, made)


def trained(trainer, name, start):
    """A network of seed 0; of seed 1 too, because so many are trained in the runs below."""
    return trainer.train(name, [start, start], [0, 1], Progress(0, quiet=True))[0]


@pytest.fixture(scope="module")
def start(trainer):
    return trained(trainer, "float", trainer.init(0)).params


@pytest.fixture(scope="module")
def relaxed(trainer, start):
    return trained(trainer, "BinaryRelax, ternary", start)


@pytest.fixture(scope="module")
def program(made, trainer):
    """The program with its data made, with functions that are traced once, and without the network
    that takes long to compile.
    """

    def run(*arguments, without=("BinaryConnect, ternary",)):
        def shared(settings, text):
            if settings != TINY:
                return Trainer(settings, text)
            fewer = copy.copy(trainer)
            fewer.networks = {n: v for n, v in trainer.networks.items() if n not in without}
            return fewer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(language_model, "load", lambda: made)
            patch.setattr(language_model, "Trainer", shared)
            return language_model.main([*OPTIONS, "--quiet", *arguments])

    return run


@pytest.fixture(scope="module")
def whole_run(program, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert program("--seeds", "0", "1", "--out", str(out)) == 0
    return out


def lines(out, seed):
    """The lines of a seed by their networks."""
    found = Study(out / "networks.jsonl").read()
    return {line["network"]: line for line in found if line["seed"] == seed}


def drop(out, name):
    """Takes the line of a network out of the study."""
    path = out / "networks.jsonl"
    kept = [text for text in path.read_text().splitlines(True) if f'"name": "{name}"' not in text]
    path.write_text("".join(kept))


def leaves(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


# Model.


def test_a_later_character_changes_no_earlier_prediction(trainer):
    start = trainer.init(0)
    codes = trainer.text.test[:16].reshape(2, 8)
    before = np.asarray(trainer.logits(start, codes))
    for place in range(1, 8):
        changed = codes.copy()
        changed[0, place] = (changed[0, place] + 1) % 12
        after = np.asarray(trainer.logits(start, changed))
        np.testing.assert_array_equal(after[0, :place], before[0, :place])
        np.testing.assert_array_equal(after[1], before[1])
        assert np.all(np.abs(after[0, place:] - before[0, place:]).max(axis=-1) > 1e-4)


def test_places_are_told_apart(trainer):
    """Without them attention would not see in which order the characters before came."""
    start = trainer.init(0)
    codes = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 2, 3, 4, 5, 6, 7]])
    logits = np.asarray(trainer.logits(start, codes))
    assert np.abs(logits[0, 2:] - logits[1, 2:]).max() > 1e-4


def test_bits_per_character_by_hand(trainer, start):
    codes, context = trainer.text.validation, TINY.context
    pieces = np.zeros((len(codes) - 1, context), int)
    places = []
    for target in range(1, len(codes)):
        first = next(s for s in range(0, len(codes), context // 2) if target <= s + context)
        pieces[target - 1, : target - first] = codes[first:target]  # nothing from it on
        places.append(target - first - 1)
    logits = np.asarray(trainer.logits(start, pieces), np.float64)
    logits = logits[np.arange(len(pieces)), places]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    bits = -np.log2(probabilities[np.arange(len(pieces)), codes[1:]])
    np.testing.assert_allclose(trainer.bits_per_character(start, codes), bits.mean(), rtol=1e-5)


def test_a_network_that_knows_nothing_has_the_bits_of_the_alphabet(trainer, start):
    zeros = jax.tree.map(np.zeros_like, start)
    bits = trainer.bits_per_character(zeros, trainer.text.test)
    np.testing.assert_allclose(bits, math.log2(12), rtol=1e-6)


def test_training_learns(trainer, start, relaxed):
    """A letter of its six is right half of the time at most: 2.6 bits, 3.6 without a look back."""
    untrained = trainer.bits_per_character(trainer.init(0), trainer.text.validation)
    first = trainer.bits_per_character(start, trainer.text.validation)
    assert first < untrained
    assert trainer.bits_per_character(relaxed.params, trainer.text.validation) < first


# Ternary networks.


def test_kernels_end_exactly_ternary_in_each_output_channel(trainer, relaxed):
    params = relaxed.params
    quantized = brx.quantized_params(relaxed.state, params)
    jax.tree.map(np.testing.assert_array_equal, params, quantized)
    distinct = {
        path: max(len(np.unique(channel)) for channel in leaf.T)
        for path, leaf in leaves(params).items()
        if leaf.ndim > 1
    }
    assert {path for path, count in distinct.items() if count <= 3} == KERNELS
    for path in KERNELS:
        scales = np.abs(leaves(params)[path]).max(axis=0)
        assert len(np.unique(scales)) > 1, "one scale for each channel"


def test_the_rounded_network_is_the_projection_of_the_float_one(whole_run):
    def params(name):
        return leaves(brx.load(whole_run / f"{name}-seed1.safetensors"))

    start, abrupt = params("float"), params("rounded-ternary")
    for path, leaf in start.items():
        if path not in KERNELS:
            np.testing.assert_array_equal(abrupt[path], leaf)
            continue
        for ours, channel in zip(abrupt[path].T, leaf.T, strict=True):
            scale, error = oracles.ternary(channel)
            np.testing.assert_allclose(np.abs(ours).max(), scale, rtol=1e-5)
            np.testing.assert_allclose(np.sum((ours - channel) ** 2), error, rtol=1e-4)


def test_rules_for_attention_kernels_of_rank_three():
    """As the docs have them for Flax's own attention."""
    channels = brx.Ternary(granularity=brx.PerChannel((-2, -1)))
    rules = brx.select(
        (r"(query|key|value)/kernel$", channels),
        default=brx.Ternary(granularity=brx.PerChannel()),
    )
    shapes = jax.eval_shape(
        nn.MultiHeadDotProductAttention(2, use_bias=False).init, jax.random.key(0), jnp.ones((5, 8))
    )["params"]
    scales = {}
    for path, qset in rules.assign(shapes).items():
        layer, _ = path.split("/")
        scales[layer] = qset.granularity.groups(shapes[layer]["kernel"].shape).scale
    inputs_last = dict.fromkeys(("query", "key", "value"), (1, 2, 4))
    assert scales == {**inputs_last, "out": (1, 1, 8)}


# Samples.


def test_samples_are_those_of_their_seed(trainer, start):
    one = trainer.sample(start, seed=3, length=40)
    assert one == trainer.sample(start, seed=3, length=40)
    assert one != trainer.sample(start, seed=4, length=40)
    assert len(one) == 40
    assert set(one) <= set(trainer.text.characters)


def test_samples_follow_the_probabilities(trainer, start):
    """A head that wants one character only writes that one."""
    sure = jax.tree.map(np.zeros_like, start)
    sure["norm"]["scale"] = start["norm"]["scale"]
    sure["characters"]["embedding"] += 1
    sure["head"]["kernel"][:, 7] = 100
    assert trainer.sample(sure, seed=0, length=10) == 10 * trainer.text.characters[7]


# Runs.


def test_a_run_keeps_what_the_table_shows(whole_run, program, tmp_path, capsys):
    results = [lines(whole_run, seed) for seed in (0, 1)]
    for line in results[0].values():
        assert line["settings"] == {k: v for k, v in vars(TINY).items() if k != "sets"}
        assert line["versions"]["jax"] == jax.__version__
        assert line["revision"] == (1 if line["result"]["values"] else None)
    networks = {name: line["result"] for name, line in results[0].items()}
    steps = {name: result["steps"] for name, result in networks.items()}
    assert steps == {
        **{"float": 20, "rounded, ternary": 20, "float, further": 40, "BinaryRelax, ternary": 40},
    }
    ternary = {"rounded, ternary", "BinaryRelax, ternary"}
    assert {name for name, result in networks.items() if result["values"] == 3} == ternary
    weights = sum(inputs * outputs for inputs, outputs in LAYERS.values())
    scales = sum(outputs for _, outputs in LAYERS.values())
    bits = math.log2(3) + 32 * scales / weights
    others = 2 * 12 * 8 + 3 * 8
    assert [*networks["float"]["curve"]] == [str(step) for step in range(1, 21)]
    assert networks["float"]["curve"]["20"] == networks["float"]["held_out"]
    for name, result in networks.items():
        expected = bits if name in ternary else 32
        assert result["bits_per_weight"] == pytest.approx(expected)
        assert result["bytes"] == pytest.approx((expected * weights + 32 * others) / 8)
    shutil.copy(whole_run / "networks.jsonl", tmp_path)  # the table and the samples need no params
    assert program("--seeds", "0", "1", "--out", str(tmp_path), "--resume") == 0
    shown = capsys.readouterr().out
    for name, result in networks.items():
        both = [each[name]["result"]["validation"] for each in results]
        assert both[0] != both[1]
        assert f"{both[0]:.3f}, {both[1]:.3f}" in shown
        assert f"--- {name}\n{result['sample']}\n" in shown


def test_a_run_that_was_killed_goes_on_to_the_same_end(whole_run, program, tmp_path, monkeypatch):
    keep, kept = Seed.save, []

    def keep_two(self, *network):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(network[0])
        keep(self, *network)

    monkeypatch.setattr(Seed, "save", keep_two)
    with pytest.raises(KeyboardInterrupt):
        program("--seeds", "0", "1", "--out", str(tmp_path))
    monkeypatch.undo()
    assert kept == ["float", "float"]  # of both seeds
    assert program("--seeds", "0", "1", "--out", str(tmp_path)) == 2
    assert program("--seeds", "0", "1", "--out", str(tmp_path), "--resume") == 0
    params = [*tmp_path.glob("*.safetensors")]
    for path in params:
        assert path.read_bytes() == (whole_run / path.name).read_bytes(), path.name
    assert len(params) == 8
    assert len([*tmp_path.iterdir()]) == 9
    for seed in (0, 1):
        assert lines(tmp_path, seed) == lines(whole_run, seed)


def test_networks_of_another_revision_are_trained_again(whole_run, program, tmp_path, monkeypatch):
    """Those that are float are not."""
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    kept = []
    monkeypatch.setattr(studies, "REVISION", 2)
    monkeypatch.setattr(Seed, "save", lambda self, name, *rest: kept.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        program("--out", str(tmp_path), "--resume")
    assert kept == ["rounded, ternary"]


@pytest.mark.soak
def test_binary_connect_beside_the_others(whole_run, program, tmp_path):
    assert program("--out", str(tmp_path), without=()) == 0
    results = lines(tmp_path, 0)
    connect = results.pop("BinaryConnect, ternary")["result"]
    assert results == lines(whole_run, 0)
    assert (connect["steps"], connect["values"]) == (40, 3)
    assert connect["validation"] != results["BinaryRelax, ternary"]["result"]["validation"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "networks.jsonl has seed 0: go on with --resume, or give another --out"),
        (["--resume", "--lr=0.5"], "of another configuration:\n  lr: 0.004 there, 0.5 here"),
    ],
)
def test_runs_that_are_in_the_way_are_refused(arguments, message, whole_run, program, capsys):
    assert program("--out", str(whole_run), *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["networks.jsonl", "float-seed0.safetensors"])
def test_what_is_damaged_is_named(name, whole_run, program, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    drop(tmp_path, "BinaryRelax-ternary-seed0")
    damaged = tmp_path / name
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert program("--out", str(tmp_path), "--resume") == 2
    message = capsys.readouterr().err
    if damaged.suffix == ".jsonl":
        assert f"{damaged}, line 7 (rounded-ternary-seed1), cannot be read" in message
        assert "remove the line to repeat the run" in message
    else:
        assert f"{damaged} cannot be read" in message
        assert f"remove the lines of seed 0 from {tmp_path / 'networks.jsonl'}" in message
        assert "start this seed again" in message


def test_a_network_that_diverged_is_shown_as_that(trainer, start, whole_run):
    nothing = Trained(jax.tree.map(lambda p: np.full_like(p, np.nan), start), None, {20: math.nan})
    broken = measured(trainer, "float", nothing, seed=0)
    assert (broken["validation"], broken["test"], broken["curve"]) == (None, None, {"20": None})
    fine = lines(whole_run, 0)["float"]["result"]
    line = row("float", [{"float": fine}, {"float": broken}])
    assert line["validation"] == "diverged"
    assert line["by seed"] == f"{fine['validation']:.3f}, diverged"


def test_spread_over_seeds():
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert spread([1.25]) == "1.250"
    assert spread([None]) == "diverged"


# Settings.


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "--steps must be at least 1, got 0"),
        ("--context=1", "--context must be at least 2, got 1"),
        ("--weight-decay=nan", "--weight-decay must be at least 0, got nan"),
        ("--further-lr=-1", "--further-lr must be at least 0, got -1"),
        ("--lr=-1", "--lr must be positive, got -1"),
        ("--heads=3", "--heads 3 must divide half of --width 8: pairs are turned"),
        ("--sets=terry", "Unknown set 'terry'"),
        ("--hard-share=1.5", "--hard-share must be from 0 to 1, got 1.5"),
        ("--warmup=20", "--warmup must be less than the steps of each network, got 20"),
        ("--seeds=-1", "--seeds must be different numbers from 0 on"),
        ("--shape=steep", "'geometric', 'linear', 'cosine', 'sigmoid'"),
    ],
)
def test_settings_out_of_range_are_refused(option, message, capsys):
    with pytest.raises(SystemExit):
        language_model.parse([*OPTIONS, option])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("further_lr", "expected"), [(0.0, 0.1), (0.02, 0.02)])
def test_the_learning_rate_of_further_training(further_lr, expected):
    settings = dataclasses.replace(TINY, lr=0.1, further_lr=further_lr, warmup=0, weight_decay=0.0)
    found = networks(settings)
    for name, size in {"float": 0.1, "float, further": expected}.items():
        optimizer, one = found[name].optimizer, np.ones((), np.float32)
        update, _ = optimizer.update(one, optimizer.init(one), one)  # Adam's first is its rate
        assert float(update) == pytest.approx(-size, rel=1e-4)


def test_runs_from_before_a_setting_have_its_default(whole_run, program, tmp_path, capsys):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    study = Study(tmp_path / "networks.jsonl")
    kept = study.read()
    study.path.unlink()
    for line in kept:
        del line["settings"]["further_lr"]
        study.add({name: value for name, value in line.items() if name != "sha256"})
    assert program("--out", str(tmp_path), "--resume") == 0
    assert program("--out", str(tmp_path), "--resume", "--further-lr=0.5") == 2
    assert "further_lr: 0.0 there, 0.5 here" in capsys.readouterr().err


def test_a_context_longer_than_a_split_is_refused(program, tmp_path, capsys):
    assert program("--out", str(tmp_path / "run"), "--context=120") == 2
    assert "held_out split has 100 characters: give a --context below" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        language_model.parse(["--help"])
    shown = capsys.readouterr().out
    for option in (*OPTIONS, "--seeds", "--out", "--resume", "--quiet"):
        assert option.split("=")[0] in shown


def test_kernels_get_the_set_and_the_head_and_embeddings_stay_float():
    params = {
        "head": {"kernel": np.ones((64, 12))},
        "characters": {"embedding": np.ones((12, 64))},
        "block_0": {"up": {"kernel": np.ones((64, 32))}},
    }
    for word, qset in {
        "ternary@mean:1.4": brx.Ternary(granularity=brx.PerChannel(), rule=brx.MeanMagnitude(1.4)),
        "q4_0": brx.formats.q4_0(),
    }.items():
        assert rules(word).assign(params) == {"block_0/up/kernel": qset}
