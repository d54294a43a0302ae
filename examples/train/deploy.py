"""What comes after training: a run's network in a file, loaded back, and in another runtime."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import brelax_jax as brx
from examples.train.loop import deployed
from examples.train.steps import Trainer, TrainState, normalize

NETWORK = "network.safetensors"
RUNTIMES = ("jax2onnx", "onnxruntime")


def save(trainer: Trainer, state: TrainState) -> Path:
    """Saves the network of a run in its directory, with the statistics of its batch norms."""
    path = Path(trainer.config.directory) / NETWORK
    _, batch_stats = deployed(trainer, state)
    brx.save(path, state.params, state.opt_state, others={"batch_stats": batch_stats})
    return path


def loaded_accuracy(trainer: Trainer, path: Path) -> float:
    """Accuracy on the test split of what is in a file."""
    params = brx.dequantize(brx.load(path, packed=True))
    return trainer.evaluate(params, params.pop("batch_stats"), trainer.data.test)


def can_run_elsewhere() -> bool:
    """Whether ONNX Runtime and a converter are installed."""
    return all(map(importlib.util.find_spec, RUNTIMES))


def accuracy_elsewhere(trainer: Trainer, state: TrainState) -> float:
    """Accuracy on the test split of the network with integer codes, in ONNX Runtime."""
    import onnxruntime  # pyright: ignore[reportMissingImports]
    from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]

    params, batch_stats = deployed(trainer, state)
    variables = {"params": params, "batch_stats": batch_stats}

    def logits(images: jax.Array) -> Any:
        return trainer.model.apply(variables, images, train=False)

    shape = trainer.data.train.shape
    floats = to_onnx(logits, inputs=[("B", *shape)])
    model = brx.export.quantize_onnx(floats, brx.quantized_tree(state.opt_state, state.params))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # float activations
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    [name] = [each.name for each in session.get_inputs()]
    correct: list[bool] = []
    for part in _parts(trainer):
        images = np.asarray(normalize(part.images, trainer.mean, trainer.std))
        [found] = session.run(None, {name: images})
        correct += (np.argmax(found, axis=-1) == part.labels).tolist()
    return float(np.mean(correct))


def _parts(trainer: Trainer) -> Sequence[Any]:
    test = trainer.data.test
    return list(test.batches([np.arange(len(test))]))
