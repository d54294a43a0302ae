"""Checkpoints of a run, by Orbax: written whole or not at all, the last two kept, each checked when
it is read.
"""

import contextlib
import gc
import hashlib
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orbax.checkpoint as ocp

from brelax_jax.transforms._state import is_earlier
from examples.runs.report import leaves
from examples.runs.studies import sha256_of_json
from examples.train.config import Config, differences
from examples.train.steps import TrainState

T = TypeVar("T")


class Checkpoints:
    """The checkpoints in a run's directory.

    Each holds the model (params and batch statistics), the rest of the training state, the run's
    configuration, and the SHA-256 of each: so a warm start can read the first without knowing the
    optimizer, and a wrong resume or an altered byte is noticed.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def epochs(self) -> list[int]:
        """The epochs after which there are checkpoints, the last one first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, epoch: int, state: TrainState, config: Config) -> None:
        """Saves the state after an epoch."""
        model, rest = _parts(state)
        settings = config.to_json()
        sums = dict(settings=sha256_of_json(settings), model=sha256(model), rest=sha256(rest))
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            rest=ocp.args.StandardSave(rest),
            config=ocp.args.JsonSave({"settings": settings, "sha256": sums}),
        )
        if not self._manager.save(epoch, args=args):
            raise ValueError(f"{self.path} holds checkpoints of later epochs than {epoch}.")

    def restore(self, like: TrainState, config: Config) -> tuple[int, TrainState] | None:
        """The last whole checkpoint, as (epoch, state); None if there are no checkpoints.

        What is later than it is removed: damaged ones, and what a process that was killed while it
        saved has left.

        Args:
          like: the state's shapes, dtypes and shardings, whatever those it was saved with.
          config: the settings of the run that is to go on.

        Raises:
          ValueError: if it is of another configuration, or if none of those there can be read.
        """
        model, rest = _parts(like)

        def read(epoch: int) -> TrainState:
            settings, sums = self._settings(epoch)
            if changed := differences(settings, config.to_json()):
                raise OtherConfiguration(
                    f"The checkpoint in {self.path} is of another configuration:\n  "
                    + "\n  ".join(changed)
                    + "\nGive the settings that it was made with, or another --out."
                )
            try:
                found = self._arrays(epoch, sums, model=model, rest=rest)
            except Exception:
                self._check_version(epoch)
                raise
            return TrainState(**found["model"], **found["rest"])

        found = self._last_whole(read)
        for epoch in self.epochs():
            if found is not None and epoch > found[0]:
                self._manager.delete(epoch)
        for unfinished in self.path.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished)
        return found

    def restore_model(self, like: TrainState, config: Config) -> dict[str, Any]:
        """The params and batch statistics of the last whole checkpoint, by these names.

        Raises:
          ValueError: if there is none, or if it is of another network.
        """
        model, _ = _parts(like)

        def read(epoch: int) -> dict[str, Any]:
            theirs, sums = self._settings(epoch)
            ours = config.to_json()
            names = ("dataset", "model", "image_size")
            if changed := differences({n: theirs[n] for n in names}, {n: ours[n] for n in names}):
                raise OtherConfiguration(
                    f"The run in {self.path.parent} trained another network:\n  "
                    + "\n  ".join(changed)
                )
            return self._arrays(epoch, sums, model=model)["model"]

        found = self._last_whole(read)
        if found is None:
            raise ValueError(f"There is no checkpoint in {self.path}: train that run first.")
        return found[1]

    def _settings(self, epoch: int) -> tuple[dict[str, Any], dict[str, str]]:
        """The configuration of a checkpoint, and the SHA-256 of its parts."""
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        found = self._manager.restore(epoch, args=args)["config"]
        if not isinstance(found, dict) or {*found} != {"settings", "sha256"}:
            raise ValueError("it holds no SHA-256, as those of earlier versions (brelax_jax 0.1.0)")
        settings, sums = found["settings"], found["sha256"]
        _check("configuration", sha256_of_json(settings), sums["settings"])
        return settings, sums

    def _check_version(self, epoch: int) -> None:
        """Raises an error if the optimizer's state is laid out as in version 0.1.0."""
        directory: Any = self.path / str(epoch) / "rest"
        if is_earlier(ocp.StandardCheckpointHandler().metadata(directory).tree):
            run = self.path.parent
            raise OtherConfiguration(
                f"The state in {self.path} was saved by brelax_jax 0.1.0, and this version cannot "
                "read it. Finish that run with 0.1.0, remove it to start again, or start another "
                f"run from its weights: --warm-start {run} and another --out."
            )

    def _arrays(self, epoch: int, sums: dict[str, str], **like: Any) -> dict[str, Any]:
        """Parts of a checkpoint by their names, laid out as asked."""
        args = {name: ocp.args.StandardRestore(part) for name, part in like.items()}
        found = self._manager.restore(epoch, args=ocp.args.Composite(**args))
        for name in like:
            _check(name, sha256(found[name]), sums[name])
        return {name: found[name] for name in like}

    def _last_whole(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """The first checkpoint, from the last one back, that can be read."""
        for epoch in self.epochs():
            with _silence():
                try:
                    return epoch, read(epoch)
                except OtherConfiguration:
                    raise
                except Exception as error:  # what is damaged raises errors of many kinds
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                    print(f"Warning: checkpoint {self.path / str(epoch)} is damaged: {reason}")
                gc.collect()
        if self.epochs():
            raise ValueError(f"No checkpoint in {self.path} can be read. Remove it to start again.")
        return None


class OtherConfiguration(ValueError):
    """A checkpoint was made with other settings than those given, or by another version."""


def sha256(tree: Any) -> str:
    """The SHA-256 of the path, dtype, shape and bytes of each array of a tree."""
    total = hashlib.sha256()
    for path, leaf in leaves(tree).items():
        array = np.asarray(leaf)
        total.update(f"{path} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def _check(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"the SHA-256 of its {name} is not the one that was written with it")


@contextlib.contextmanager
def _silence() -> Generator[None, None, None]:
    """Keeps back what the reads that Orbax drops print, when one of them has failed."""
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = sys.excepthook = lambda *_: None
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = hooks


def _parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint keeps as the model, and the rest of the state."""
    model = {"params": state.params, "batch_stats": state.batch_stats}
    return model, {"step": state.step, "opt_state": state.opt_state}
