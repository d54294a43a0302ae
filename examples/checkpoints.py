"""Checkpoints of a run, by Orbax: written whole or not at all, the last two kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import orbax.checkpoint as ocp

from examples.config import Config, differences
from examples.steps import TrainState

T = TypeVar("T")


class Checkpoints:
    """The checkpoints in a run's directory.

    Each holds the model (params and batch statistics), the rest of the training state, and the
    run's configuration: so a warm start can read the first without knowing the optimizer, and a
    wrong resume is noticed.
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
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            rest=ocp.args.StandardSave(rest),
            config=ocp.args.JsonSave(config.to_json()),
        )
        self._manager.save(epoch, args=args)

    def restore(self, like: TrainState, config: Config) -> tuple[int, TrainState] | None:
        """The last whole checkpoint, as (epoch, state); None if there are no checkpoints.

        Raises:
          ValueError: if it is of another configuration, or if none of those there can be read.
        """
        model, rest = _parts(like)

        def read(epoch: int) -> TrainState:
            theirs = self._read(epoch, config=ocp.args.JsonRestore())["config"]
            if changed := differences(theirs, config.to_json()):
                raise OtherConfiguration(
                    f"The checkpoint in {self.path} is of another configuration:\n  "
                    + "\n  ".join(changed)
                    + "\nGive the settings that it was made with, or another --out."
                )
            args = dict(model=ocp.args.StandardRestore(model), rest=ocp.args.StandardRestore(rest))
            found = self._read(epoch, **args)
            return TrainState(**found["model"], **found["rest"])

        found = self._last_whole(read)
        for epoch in self.epochs():
            if found is not None and epoch > found[0]:  # damaged, and in the way of the new one
                self._manager.delete(epoch)
        return found

    def restore_model(self, like: TrainState, config: Config) -> dict[str, Any]:
        """The params and batch statistics of the last whole checkpoint, by these names.

        Raises:
          ValueError: if there is none, or if it is of another network.
        """
        model, _ = _parts(like)

        def read(epoch: int) -> dict[str, Any]:
            theirs = self._read(epoch, config=ocp.args.JsonRestore())["config"]
            ours = config.to_json()
            names = ("dataset", "model", "image_size")
            if changed := differences({n: theirs[n] for n in names}, {n: ours[n] for n in names}):
                raise OtherConfiguration(
                    f"The run in {self.path.parent} trained another network:\n  "
                    + "\n  ".join(changed)
                )
            return self._read(epoch, model=ocp.args.StandardRestore(model))["model"]

        found = self._last_whole(read)
        if found is None:
            raise ValueError(f"There is no checkpoint in {self.path}: train that run first.")
        return found[1]

    def _read(self, epoch: int, **args: Any) -> Any:
        return self._manager.restore(epoch, args=ocp.args.Composite(**args))

    def _last_whole(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """The first checkpoint, from the last one back, that can be read."""
        for epoch in self.epochs():
            try:
                return epoch, read(epoch)
            except OtherConfiguration:
                raise
            except Exception as error:  # what is damaged raises errors of many kinds
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
                print(f"Warning: checkpoint {self.path / str(epoch)} is damaged: {reason}")
        if self.epochs():
            raise ValueError(f"No checkpoint in {self.path} can be read. Remove it to start again.")
        return None


class OtherConfiguration(ValueError):
    """A checkpoint was made with other settings than those given."""


def _parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint keeps as the model, and the rest of the state."""
    model = {"params": state.params, "batch_stats": state.batch_stats}
    return model, {"step": state.step, "opt_state": state.opt_state}
