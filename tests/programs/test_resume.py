"""The training program, killed and resumed, ends as if it had not been; damage is noticed."""

import dataclasses
import gc
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event

from examples.runs import events, plots
from examples.runs.log import Log, read
from examples.train import __main__ as train
from examples.train import cli, loop
from examples.train.checkpoints import Checkpoints, sha256
from examples.train.config import Config
from examples.train.data import load as data
from examples.train.steps import Trainer, TrainState
from tests.helpers import covering, forked, killed
from tests.helpers.killed import TINY

CLOCK = ("seconds", "images_per_second")
SETTINGS = [
    *("--quiet", f"--model={TINY}", "--set=binary", "--granularity=channel", "--tensorboard"),
    *("--epochs=5", "--batch=32", "--train-examples=96", "--metrics-every=1"),
    *("--statistics-batches=2", "--checkpoint-every=2"),
]  # checkpoints after epochs 2, 4 and 5, of three steps each


@pytest.fixture(scope="module", autouse=True)
def cache(quickly_compiled, traced_once, undrawn):
    return quickly_compiled


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    """The float run that the others start from."""
    out = str(tmp_path_factory.mktemp("float") / "run")
    settings = ["--quiet", f"--model={TINY}", "--method=float", "--epochs=1", "--train-examples=96"]
    assert train.main(["--out", out, *settings]) == 0
    return out


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory) -> Iterator[Config]:
    config = settled(tmp_path_factory.mktemp("whole") / "run", start)
    with pytest.MonkeyPatch.context() as patch:  # the pictures of equal logs are the same
        patch.setattr(plots, "plot_runs", lambda *_: None)
        patch.setattr(plots, "plot_metrics", lambda *_: None)
        yield config


@pytest.fixture(scope="module")
def trainer(uninterrupted) -> Trainer:
    config = uninterrupted
    trainer = loop.Trainer(
        config, data.load("digits", None, config.validation, config.train_examples, progress=False)
    )
    gc.freeze()  # what is there stays: the collection after each damage need not go through it
    return trainer


def arguments(out, start):
    return ["--out", str(out), "--warm-start", start, *SETTINGS]


def settled(out, start) -> Config:
    """The configuration of a run, when it has ended, here or where it was killed."""
    assert train.main(going_on(out, start)) == 0
    return cli.parse(arguments(out, start))[0]


def going_on(out, start):
    """The arguments that start or resume the run."""
    return [*arguments(out, start), *(["--resume"] if Log(out).path.exists() else [])]


def kill(out, start, nth, pattern):
    """Starts or resumes the run; whether it was killed."""
    status = forked.run(out.parent, killed.main, nth, pattern, *going_on(out, start))
    assert status in (0, -signal.SIGKILL), (out.parent / "printed").read_text()[-2000:]
    return status != 0


def check_same(config, uninterrupted, trainer):
    """State, log and events are those of the uninterrupted run, and nothing is left over."""
    for found, expected in zip(
        arrays(config, trainer), arrays(uninterrupted, trainer), strict=True
    ):
        assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes())
    assert log(config) == log(uninterrupted)
    assert points(config) == points(uninterrupted)
    left = [
        sorted(p.name for p in (Path(c.out) / "checkpoints").iterdir())
        for c in (config, uninterrupted)
    ]
    assert left[0] == left[1]


def arrays(config, trainer):
    found = Checkpoints(config.out).restore(trainer.abstract_state(), config)
    assert found is not None
    assert found[0] == config.epochs
    return list(map(np.asarray, jax.tree.leaves(found[1])))


def log(config):
    lines = read(Log(config.out).path)
    assert len(lines) == len(Log(config.out).path.read_text().splitlines())
    lines[0]["config"].pop("out")
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def points(config):
    """The (tag, step, value) of the event file, none of them twice."""
    (file,) = Path(config.out).glob(events.FILES)
    content, found = file.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        for value in event.summary.value:
            assert (value.tag, event.step) not in found
            found[value.tag, event.step] = value.simple_value
    return {place: value for place, value in found.items() if place[0] not in CLOCK}


# Kills.


def test_two_kills_one_of_them_during_a_save(start, uninterrupted, trainer, tmp_path):
    out = tmp_path / "run"
    steps = 15
    assert kill(out, start, random.Random(0).randrange(1, steps), "open .*/log.jsonl")
    assert kill(out, start, 1, "os.rename .*/4.orbax-checkpoint-tmp$")
    assert (out / "checkpoints" / "4.orbax-checkpoint-tmp").is_dir()
    check_same(settled(out, start), uninterrupted, trainer)


@pytest.mark.soak
def test_twenty_kills(start, uninterrupted, trainer, cache, tmp_path):
    """At changes of files, of which there is one in every step; during saves; by the clock."""
    rng = random.Random(1)
    kills = {"any": 0, "save": 0, "clock": 0}
    for number in range(100):
        out = tmp_path / f"run{number}"
        for _ in range(rng.randint(1, 6)):
            kind = min(kills, key=lambda kind: (kills[kind], rng.random()))
            if kind == "clock":
                kills[kind] += kill_by_clock(out, start, cache, rng.randrange(25), rng.random())
            else:
                pattern, changes = {"any": (".", 100), "save": ("checkpoint-tmp", 60)}[kind]
                kills[kind] += kill(out, start, rng.randint(1, changes), pattern)
        check_same(settled(out, start), uninterrupted, trainer)
        if sum(kills.values()) >= 20:
            break
    assert min(kills.values()) >= 5


def kill_by_clock(out, start, cache, lines, share):
    """Kills the run when it has logged so many lines and a part of the next, or at once while it
    loads; whether it was still there.
    """
    path = Log(out).path
    before = written(path)
    command = [sys.executable, "-m", "tests.helpers.killed", "0", ".", *going_on(out, start)]
    with subprocess.Popen(command, env=os.environ | cache, stdout=subprocess.DEVNULL) as process:
        while lines and process.poll() is None and written(path) < before + lines:
            time.sleep(0.001)
        time.sleep(0.02 * share if lines else 8 * share)
        running = process.poll() is None
        process.kill()
    return running


def written(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_before_the_first_checkpoint(start, uninterrupted, trainer, tmp_path):
    """Half a checkpoint, half a line and half an event file are all that it left."""
    config = copied(uninterrupted, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    last = tmp_path / "run" / "checkpoints" / "5"
    shutil.rmtree(last / "rest")
    last.rename(last.with_name("2.orbax-checkpoint-tmp"))
    halve(Log(config.out).path)
    halve(next(Path(config.out).glob(events.FILES)))
    check_same(settled(config.out, start), uninterrupted, trainer)


def test_killed_between_the_last_checkpoint_and_the_result(start, uninterrupted, trainer, tmp_path):
    config = copied(uninterrupted, tmp_path)
    path = Log(config.out).path
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20])
    check_same(settled(config.out, start), uninterrupted, trainer)


def test_killed_while_the_oldest_checkpoint_was_removed(start, uninterrupted, trainer, tmp_path):
    config = copied(uninterrupted, tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "4", checkpoints / "2")
    shutil.rmtree(checkpoints / "2" / "model")
    (checkpoints / "2" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(checkpoints / "5")
    check_same(settled(config.out, start), uninterrupted, trainer)


def test_tensorboard_shows_what_was_logged(uninterrupted):
    """Of the lines before and after a resume alike: the file is made from the log."""
    lines, found = read(Log(uninterrupted.out).path), points(uninterrupted)
    expected = {}
    for line in lines:
        if line["kind"] == "epoch":
            for tag in ("loss", "learning_rate", "lam", "strength"):
                expected[tag, line["step"]] = line[tag]
            expected["accuracy/train", line["step"]] = line["accuracy"]
            for name in ("validation_current", "validation_deployed"):
                expected[f"accuracy/{name}", line["step"]] = line[name]
        if line["kind"] == "metrics":
            for layer, values in line["layers"].items():
                for name in ("distance", "flips", "scale"):
                    expected[f"{name}/{layer}", line["step"]] = values[name]
                for level, share in zip(("-1", "1"), values["occupancy"], strict=True):
                    expected[f"occupancy/{layer}/{level}", line["step"]] = share
    expected = {place: value for place, value in expected.items() if value != "inf"}
    assert found == pytest.approx(expected)
    assert {step for _, step in found} == set(range(1, 16))


def test_a_log_is_replaced_at_once(uninterrupted, tmp_path, monkeypatch):
    config = copied(uninterrupted, tmp_path)
    log = Log(config.out)
    before = log.path.read_text()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    for change in (lambda: log.cut(2), lambda: log.start(config.to_json())):
        with pytest.raises(KeyboardInterrupt):
            change()
        assert log.path.read_text() == before


# Damage.


@pytest.fixture(scope="module")
def sums(uninterrupted, trainer):
    """The SHA-256 of the states in the two checkpoints, by their epochs."""
    return {epoch: sha256(raw(uninterrupted.out, epoch, trainer)) for epoch in (4, 5)}


@pytest.mark.parametrize("places", [1, pytest.param(25, marks=pytest.mark.soak)])
def test_an_altered_or_truncated_file_is_noticed(
    places, uninterrupted, trainer, sums, tmp_path, capsys
):
    """Either the arrays are what was saved, or the checkpoint before is taken, with a warning."""
    last = Path(uninterrupted.out) / "checkpoints" / "5"
    files = [f.relative_to(last) for f in sorted(last.rglob("*")) if f.is_file()]
    if places == 1:  # of the rest of the state only the arrays, beside the files of the model
        files = [file for file in files if file.parts[0] != "rest" or file.parts[1] == "d"]
    noticed = set()
    for file in files:
        content = (last / file).read_bytes()
        several = 5 * places if file.match("config/metadata") else places
        for place in {len(content) * (2 * i + 1) // (2 * several) for i in range(several)}:
            altered = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            for damaged in (altered, content[:place])[:places]:
                config = copied(uninterrupted, tmp_path)
                (tmp_path / "run" / "checkpoints" / "5" / file).write_bytes(damaged)
                epoch, state = Checkpoints(config.out).restore(trainer.abstract_state(), config)
                assert sha256(state) == sums[epoch]
                assert (epoch == 4) == ("checkpoints/5 is damaged" in capsys.readouterr().out)
                assert epoch == 4 or not file.match("config/metadata")
                noticed |= {file.parts[:2]} if epoch == 4 else set()
                shutil.rmtree(config.out)
    assert {("config", "metadata"), ("model", "d"), ("rest", "d")} <= noticed


@pytest.mark.parametrize(
    "where",
    covering.some(
        ["step", "trace", "float_params", "codes", "kernel", "mean"], ["step", "codes", "kernel"]
    ),
)
def test_one_bit_of_one_array_is_noticed(where, uninterrupted, trainer, sums, tmp_path, capsys):
    """In a checkpoint that Orbax finds in order, as it does not know what was meant."""

    def flipped(path, leaf):
        if where not in jax.tree_util.keystr(path) or flips:
            return leaf
        flips.append(path)
        content = bytearray(np.asarray(leaf).tobytes())
        content[0] ^= 1
        return jnp.asarray(np.frombuffer(content, leaf.dtype).reshape(leaf.shape))

    flips = []
    config = copied(uninterrupted, tmp_path)
    state = jax.tree_util.tree_map_with_path(flipped, raw(config.out, 5, trainer))
    settings = json.loads((tmp_path / "run/checkpoints/5/config/metadata").read_text())
    replace(config.out, 5, state, settings)
    epoch, state = Checkpoints(config.out).restore(trainer.abstract_state(), config)
    assert flips
    assert (epoch, sha256(state)) == (4, sums[4])
    part = "model" if where in ("kernel", "mean") else "rest"
    assert f"5 is damaged: the SHA-256 of its {part} is not the one" in capsys.readouterr().out


def test_damage_of_all_checkpoints_is_an_error(start, uninterrupted, tmp_path, capsys):
    config = copied(uninterrupted, tmp_path)
    for path in (tmp_path / "run" / "checkpoints").glob("*/config/metadata"):
        path.write_bytes(path.read_bytes().replace(b"0.1", b"0.2", 1))
    assert train.main([*arguments(config.out, start), "--resume"]) == 2
    printed = capsys.readouterr()
    assert printed.out.count("is damaged: the SHA-256 of its configuration") == 2
    assert f"No checkpoint in {tmp_path}/run/checkpoints can be read. Remove it" in printed.err
    assert "Traceback" not in printed.err


def test_a_warm_start_from_altered_weights_is_refused(start, uninterrupted, trainer, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    (settings,) = (tmp_path / "start" / "checkpoints").glob("*/config/metadata")
    content = json.loads(settings.read_text())
    content["sha256"]["model"] = content["sha256"]["rest"]
    settings.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be read"):
        Checkpoints(tmp_path / "start").restore_model(trainer.abstract_state(), uninterrupted)


def test_checkpoints_of_earlier_versions_are_named(uninterrupted, trainer, tmp_path, capsys):
    config = copied(uninterrupted, tmp_path)
    replace(config.out, 5, raw(config.out, 5, trainer), config.to_json())
    assert Checkpoints(config.out).restore(trainer.abstract_state(), config)[0] == 4
    assert "5 is damaged: it holds no SHA-256, as those of earlier" in capsys.readouterr().out


def test_a_state_of_0_1_0_is_refused_and_only_its_weights_are_taken(
    start, uninterrupted, trainer, tmp_path, capsys
):
    config = copied(uninterrupted, tmp_path)
    state = raw(config.out, 5, trainer)
    fields = state.opt_state._asdict()
    fields["cuts"] = fields.pop("code_scales")
    settings = json.loads((tmp_path / "run/checkpoints/5/config/metadata").read_text())
    replace(config.out, 5, state._replace(opt_state=fields), settings)
    assert train.main([*arguments(config.out, start), "--resume"]) == 2
    printed = capsys.readouterr()
    assert "was saved by brelax_jax 0.1.0" in printed.err
    assert f"--warm-start {tmp_path}/run and another --out" in printed.err
    assert "damaged" not in printed.out
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("[0-9]")) == ["4", "5"]
    model = Checkpoints(config.out).restore_model(trainer.abstract_state(), config)
    jax.tree.map(np.testing.assert_array_equal, model["params"], state.params)


def manager(out):
    return ocp.CheckpointManager(
        Path(out) / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )


def parts(state):
    return {
        "model": {"params": state.params, "batch_stats": state.batch_stats},
        "rest": {"step": state.step, "opt_state": state.opt_state},
    }


def raw(out, epoch, trainer):
    """The state in a checkpoint, by Orbax alone."""
    args = {n: ocp.args.StandardRestore(p) for n, p in parts(trainer.abstract_state()).items()}
    found = manager(out).restore(epoch, args=ocp.args.Composite(**args))
    return TrainState(**found["model"], **found["rest"])


def replace(out, epoch, state, settings):
    """Puts another checkpoint in the place of one, by Orbax alone."""
    args = {name: ocp.args.StandardSave(part) for name, part in parts(state).items()}
    there = manager(out)
    there.delete(epoch)
    there.save(epoch, args=ocp.args.Composite(config=ocp.args.JsonSave(settings), **args))
    there.close()


def copied(config, tmp_path):
    """The run again, in another directory."""
    shutil.copytree(config.out, tmp_path / "run")
    return dataclasses.replace(config, out=str(tmp_path / "run"))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
