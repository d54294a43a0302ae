"""The training program's settings, and what they say of sets, λ and learning rates."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from examples.runs.sets import parse_set
from examples.train import cli
from examples.train.config import PRESETS, Config
from examples.train.optimizer import continuation, layer_sets, learning_rate


def test_options_override_the_preset_and_the_preset_the_defaults():
    config, options = cli.parse(
        ["--preset", "paper", "--lr-drops", "3,5", "--epochs", "9", "--hard-from", "7"]
    )
    assert (config.lr_drops, config.epochs, config.hard_from) == ((3.0, 5.0), 9, 7.0)
    assert (config.model, config.lam_growth, config.lr_schedule) == ("vgg11", 1.04, "drops")
    assert not options.resume
    assert cli.parse([])[0] == Config()


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, "linear"),
        ({"warm_start": "runs/float"}, "geometric"),
        ({"lam_growth": 1.5}, "geometric"),
        ({"warm_start": "runs/float", "lam_schedule": "cosine"}, "cosine"),
        ({"method": "parq", "warm_start": "runs/float"}, "sigmoid"),
        ({"method": "parq", "lam_end": 50.0}, "geometric"),
    ],
)
def test_lam_grows_as_the_start_and_the_options_say(settings, shape):
    assert Config(**settings).lam_shape == shape


def test_the_paper_preset_is_the_authors_recipe():
    config = Config(**PRESETS["paper"])
    lam, lr = continuation(config, 390), learning_rate(config, 390)
    epochs = (0, 1, 149)
    np.testing.assert_allclose(
        [lam(390 * e) for e in epochs], [1.04 ** (1 + e) for e in epochs], rtol=1e-4
    )
    np.testing.assert_allclose(
        [lr(390 * e) for e in (79.9, 80.1, 140.1)], [0.1, 0.01, 0.001], rtol=1e-5
    )
    kernel = jnp.ones((3, 3, 4, 4))
    params = {name: {"kernel": kernel} for name in ("stem", "conv_2", "head")}
    params["BatchNorm_0"] = {"scale": jnp.ones(4)}
    kernels = dict.fromkeys(("stem/kernel", "conv_2/kernel"), brx.Binary())
    assert layer_sets(config).assign(params) == kernels


def test_learning_rate_of_phase_two_is_capped():
    config = Config(epochs=4, lr=0.1, hard_lr=1e-3)
    lr = learning_rate(config, 10)
    assert float(lr(29)) > 1e-3
    np.testing.assert_allclose(float(lr(30)), 1e-3, rtol=1e-6)
    assert float(lr(39)) < 1e-3


@pytest.mark.parametrize(
    ("word", "granularity", "qset"),
    [
        ("binary", "tensor", brx.Binary()),
        ("ternary", "channel", brx.Ternary(granularity=brx.PerChannel())),
        ("ternary-threshold", "channel:0", brx.TernaryThreshold(granularity=brx.PerChannel(0))),
        ("uniform4", "block:64", brx.Uniform(4, granularity=brx.PerBlock(64))),
        ("power3", "block:8:-2", brx.PowerOfTwo(3, granularity=brx.PerBlock(8, -2))),
        ("levels:-3,-1,1,3", "tensor", brx.ScaledLevels((-3, -1, 1, 3))),
        ("ternary@mean:1.4", "tensor", brx.Ternary(rule=brx.MeanMagnitude(1.4))),
        ("ternary@mean:1:norefit", "tensor", brx.Ternary(rule=brx.MeanMagnitude(1.0, refit=False))),
        ("uniform8@max", "tensor", brx.Uniform(8, rule=brx.MaxMagnitude())),
        ("binary@fixed:1", "tensor", brx.Binary(rule=brx.Fixed(1.0))),
        ("q4_0", "tensor", brx.formats.q4_0()),
        ("bitnet@mean:1:norefit", "tensor", brx.formats.bitnet(rule=brx.MeanMagnitude(1.0, False))),
    ],
)
def test_words_for_sets(word, granularity, qset):
    assert parse_set(word, granularity) == qset
    if qset.is_searched:
        kept = dataclasses.replace(qset, rule=brx.LeastSquares(0.01))
        assert parse_set(word, granularity, 0.01) == kept


@pytest.mark.parametrize(
    ("word", "granularity", "message"),
    [
        ("quaternary", "tensor", "Unknown set 'quaternary'.*ternary-threshold"),
        ("uniform9", "tensor", "bits must be from 2 to 8.*uniform2"),
        ("uniformly", "tensor", "Set 'uniformly'"),
        ("levels:1,2", "tensor", "symmetric"),
        ("ternary@median", "tensor", "Unknown rule 'median'.*mean:FACTOR"),
        ("ternary@mean:-1", "tensor", "Unknown rule 'mean:-1' .factor must be"),
        ("binary", "row", "Unknown granularity 'row'.*block:SIZE"),
        ("binary", "block", "Unknown granularity 'block'"),
    ],
)
def test_words_that_name_no_set(word, granularity, message):
    with pytest.raises(ValueError, match=message):
        parse_set(word, granularity)


@pytest.mark.parametrize(
    "option",
    [
        *(
            "--validation=1",
            "--epochs=0",
            "--hard-from=99",
            "--lam-start=0",
            "--hold=1",
            "--average=99",
            "--lr-drops=3",
        ),
        *("--metrics-every=-1", "--mesh=4"),
    ],
)
def test_numbers_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        cli.parse([option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    text = capsys.readouterr().out
    assert all("--" + f.name.replace("_", "-") in text for f in dataclasses.fields(Config))
