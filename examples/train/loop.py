"""The training loop: from a configuration to a run's directory with its log and checkpoints."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

import brelax_jax as brx
from examples.runs.events import Events
from examples.runs.log import Log
from examples.runs.progress import Progress
from examples.runs.report import bits_per_weight, leaves, quantized_layers, size_in_bytes
from examples.train.checkpoints import Checkpoints
from examples.train.config import Config
from examples.train.data.load import Data
from examples.train.data.splits import AnySplit
from examples.train.optimizer import layer_sets
from examples.train.steps import Sums, Trainer, TrainState

SNAPSHOTS = 9  # histograms of a layer's weights in a log
BINS, RANGE = 61, 3.0  # the range is in units of their root mean square


Finish: TypeAlias = Callable[[Trainer, TrainState], None]


def run(
    config: Config,
    data: Data,
    progress: Progress,
    resume: bool = False,
    finish: Finish | None = None,
) -> dict[str, Any]:
    """Trains, and returns the log's last line: test accuracy and what the layers hold.

    Args:
      config: the settings.
      data: the splits.
      progress: the bar.
      resume: whether to go on from the last checkpoint.
      finish: what to do with the trained network.

    Raises:
      ValueError: if the run's directory is in use, or its checkpoint of another configuration.
    """
    log = Log(config.directory)
    if not resume and (log.path.exists() or any(log.path.parent.glob("checkpoints/[0-9]*"))):
        raise ValueError(
            f"{config.directory} holds a run: go on with --resume, or give another --out."
        )
    trainer = Trainer(config, data)
    checkpoints = Checkpoints(config.directory)
    begun, state = start(trainer, checkpoints, config, resume)
    if begun and log.path.exists():
        log.cut(begun)
    else:
        log_start(log, config, data, state.params)
        log_weights(log, begun, state, config)
    progress.skip(begun * trainer.images_per_epoch)
    with contextlib.ExitStack() as stack:
        if config.tensorboard:
            log.follow(stack.enter_context(contextlib.closing(Events(config.directory))).write)
        state, result = train(trainer, state, begun, log, checkpoints, progress)
    if finish is not None:
        finish(trainer, state)
    return result


def log_start(log: Log, config: Config, data: Data, params: Any, **facts: Any) -> None:
    """Begins the log of a run."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    log.start(config.to_json(), examples=len(data.train), parameters=size, **facts)


def train(
    trainer: Trainer,
    state: TrainState,
    begun: int,
    log: Log,
    checkpoints: Checkpoints,
    progress: Progress,
) -> tuple[TrainState, dict[str, Any]]:
    """The epochs after those that are done: the trained state, and the result."""
    config, data = trainer.config, trainer.data
    for epoch in range(begun + 1, config.epochs + 1):
        state, values = train_epoch(trainer, state, epoch, log, progress)
        values |= evaluate(trainer, state, data.validation if len(data.validation) else data.test)
        log.write("epoch", epoch=epoch, step=state.step, **values)
        if weights_due(epoch, config):
            log_weights(log, epoch, state, config)
        if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
            checkpoints.save(epoch, state, config)
        progress.line(epoch_line(epoch, config, values))
    result = final_result(trainer, state)
    log.write("result", epoch=config.epochs, **result)
    return state, result


def start(
    trainer: Trainer, checkpoints: Checkpoints, config: Config, resume: bool
) -> tuple[int, TrainState]:
    """The epoch and the state to go on from: resumed, warm or fresh."""
    found = checkpoints.restore(trainer.abstract_state(), config) if resume else None
    if found is not None:
        return found
    if config.warm_start is not None:
        if not Path(config.warm_start).is_dir():
            raise ValueError(f"There is no run to start from in {config.warm_start}.")
        model = Checkpoints(config.warm_start).restore_model(trainer.abstract_state(), config)
        return 0, trainer.warm_state(model["params"], model["batch_stats"])
    return 0, trainer.init()


def train_epoch(
    trainer: Trainer, state: TrainState, epoch: int, log: Log, progress: Progress
) -> tuple[TrainState, dict[str, Any]]:
    """One pass over the training split, and its averages."""
    begin = time.perf_counter()
    total = Sums()
    label = f"{Path(trainer.config.directory).name} {epoch}/{trainer.config.epochs}"
    first = (epoch - 1) * trainer.steps_per_epoch + 1
    for step, batch in enumerate(trainer.batches(epoch), start=first):
        state, sums = trainer.step(state, batch.images, batch.labels)
        total = total.plus(sums)
        if trainer.config.metrics_due(step, trainer.steps_per_epoch):
            log.write("metrics", epoch=epoch, step=step, layers=layer_metrics(trainer, state))
        progress.advance(len(batch))
        if progress.due():
            progress.figures(label, loss=sums.mean_loss, acc=sums.accuracy, **pull(trainer, state))
    loss, accuracy = total.mean_loss, total.accuracy  # waits for the device
    seconds = time.perf_counter() - begin
    values = dict(loss=loss, accuracy=accuracy, learning_rate=trainer.learning_rate(state.step - 1))
    speed = trainer.images_per_epoch / seconds
    return state, {**values, **pull(trainer, state), "seconds": seconds, "images_per_second": speed}


def pull(trainer: Trainer, state: TrainState) -> dict[str, float]:
    """λ and the strength of the last step; nothing for a float run."""
    if trainer.config.method == "float":
        return {}
    return pull_of(float(brx.strength(state.opt_state)))


def pull_of(alpha: float) -> dict[str, float]:
    """A strength, and the λ that it belongs to."""
    return {"lam": alpha / (1 - alpha) if alpha < 1 else math.inf, "strength": float(alpha)}


def layer_metrics(trainer: Trainer, state: TrainState) -> dict[str, dict[str, Any]]:
    """The metrics of each quantized layer; waits for the device."""
    sets = layer_sets(trainer.config).assign(state.params)
    values = jax.device_get(trainer.metrics(state.opt_state, state.params))
    return {path: shown_metrics(each, sets[path]) for path, each in values.items()}


def shown_metrics(values: brx.LeafMetrics, qset: brx.QuantizedSet) -> dict[str, Any]:
    """The metrics of a layer as a log has them, with the mean of its scales."""
    mean_scale = np.mean(values.scale, dtype=np.float64)
    return {**values._asdict(), "scale": mean_scale, "levels": qset.levels}


def deployed(trainer: Trainer, state: TrainState) -> tuple[Any, Any]:
    """The params to deploy, on their sets, and batch statistics that belong to them."""
    if trainer.config.deploys_as_trained:
        return state.params, state.batch_stats
    params = trainer.deployed(state)
    return params, trainer.batch_statistics(params)


def evaluate(trainer: Trainer, state: TrainState, split: AnySplit) -> dict[str, Any]:
    """Accuracy of the current params, with their running statistics, and of the deployed ones."""
    name = "test" if split is trainer.data.test else "validation"
    current = trainer.evaluate(state.params, state.batch_stats, split)
    if trainer.config.deploys_as_trained:
        return {f"{name}_current": current, f"{name}_deployed": current}
    return {
        f"{name}_current": current,
        f"{name}_deployed": trainer.evaluate(*deployed(trainer, state), split),
    }


def final_result(trainer: Trainer, state: TrainState) -> dict[str, Any]:
    """Test accuracy, and what each quantized layer holds."""
    params, _ = deployed(trainer, state)
    return {**evaluate(trainer, state, trainer.data.test), **what_is_held(params, trainer.config)}


def what_is_held(params: Any, config: Config) -> dict[str, Any]:
    """What deployed params hold, layer by layer, and their size."""
    layers = [] if config.method == "float" else quantized_layers(params, layer_sets(config))
    return {
        "bits_per_weight": bits_per_weight(layers),
        "bytes": size_in_bytes(params, layers),
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }


def epoch_line(epoch: int, config: Config, values: dict[str, Any]) -> str:
    """An epoch in one line."""
    name = "test" if "test_current" in values else "validation"
    text = f"epoch {epoch:3d}/{config.epochs}  loss {values['loss']:.3f}"
    text += f"  train {values['accuracy']:6.2%}"
    text += f"  {name} {values[name + '_deployed']:6.2%}"
    if config.method != "float":
        text += f"  not deployed {values[name + '_current']:6.2%}"
        text += f"  λ {values['lam']:.3g}  α {values['strength']:.3f}"
    return text + f"  {values['images_per_second']:.0f} img/s  {values['seconds']:.1f} s"


def weights_due(epoch: int, config: Config) -> bool:
    """Whether a histogram of weights is logged after this epoch."""
    return epoch in np.linspace(0, config.epochs, SNAPSHOTS).round()


def log_weights(log: Log, epoch: int, state: TrainState, config: Config) -> None:
    """Logs the histogram of the largest quantized layer's weights, for the plot."""
    if config.method == "float":
        return
    arrays = leaves(state.params)
    kernels = {path: arrays[path] for path in layer_sets(config).assign(state.params)}
    path = max(kernels, key=lambda path: kernels[path].size)
    values = np.asarray(kernels[path], np.float32).ravel()
    counts, _ = np.histogram(
        values / np.sqrt(np.mean(np.square(values))), BINS, range=(-RANGE, RANGE)
    )
    log.write(
        "weights",
        epoch=epoch,
        layer=path,
        strength=brx.strength(state.opt_state),
        range=RANGE,
        counts=counts,
    )
