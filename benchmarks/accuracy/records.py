"""What a run of the accuracy grid leaves: a small JSON, made from its log."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.runs import START, Run, neutral_settings, placed, settings_of
from examples.runs.checkpoints import sha256_of_json
from examples.runs.log import Log, read
from examples.train.config import Config, differences


def finished(run: Run) -> bool:
    """Whether the log of the run has its result."""
    path = Log(run.config.directory).path
    return path.exists() and any(line["kind"] == "result" for line in read(path))


def collect(run: Run) -> dict[str, Any]:
    """The JSON of a finished run, from its log.

    Raises:
      ValueError: if the log is of other settings.
    """
    path = Log(run.config.directory).path
    lines = read(path)
    header, result = lines[0], lines[-1]
    _check_settings(path, settings_of(header["config"]), run.settings)
    weights = {layer["path"]: layer["weights"] for layer in result["layers"]}
    epochs = [line for line in lines if line["kind"] == "epoch"]
    columns = [name for name in epochs[0] if "_current" in name or "_deployed" in name]
    curve = {
        name: [line[name] for line in epochs]
        for name in ("loss", *columns, "strength")
        if name in epochs[0]
    }
    metrics = {line["epoch"]: line["layers"] for line in lines if line["kind"] == "metrics"}
    for name in ("distance", "flips"):
        if metrics:
            curve[name] = [
                _mean(metrics[line["epoch"]], name, weights)
                for line in epochs
                if line["epoch"] in metrics
            ]
    facts = {name: result[name] for name in ("test_deployed", "test_current", "bits_per_weight")}
    return {
        "name": run.name,
        "method": run.method,
        "settings": run.settings,
        "versions": header["versions"],
        "device": header["device"],
        "training_examples": header["examples"],
        "seconds": round(sum(line["seconds"] for line in epochs), 1),
        "diverged": not all(math.isfinite(float(loss)) for loss in curve["loss"]),
        **facts,
        "curve": curve,
    }


def _mean(layers: dict[str, dict[str, Any]], name: str, weights: dict[str, int]) -> float | str:
    """The mean of a metric over the layers, weighted by their weights."""
    values = [float(layers[path][name]) for path in weights]
    mean = float(np.average(values, weights=list(weights.values())))
    return float(f"{mean:.4g}") if math.isfinite(mean) else str(mean)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Puts a JSON in its place, at once, with its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    whole = {**record, "sha256": sha256_of_json(record)}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in whole.items()]
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(beside, path)


def read_record(path: Path, run: Run | None = None) -> dict[str, Any]:
    """A JSON that a run has left.

    Raises:
      ValueError: if it has been altered, or is of other settings than those of `run`.
    """
    try:
        record = json.loads(path.read_text())
        total = record.pop("sha256")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the JSON of a run: {error!r}.") from None
    if run is not None:
        _check_settings(path, settings_of(record.get("settings", {})), run.settings)
    if sha256_of_json(record) != total or record["name"] != path.stem:
        raise ValueError(f"{path} has been altered since it was written: remove it to repeat it.")
    return record


def mistaken_name(record: dict[str, Any], base: Config) -> str | None:
    """What is wrong with a JSON's name, if its settings give it another."""
    settings = settings_of(record["settings"])
    settings["lr_drops"] = tuple(settings["lr_drops"])
    method, config = record["method"], Config(**settings)
    neutral = base if method == START else neutral_settings(base, method)
    name = placed(method, config, neutral, ".").name
    return None if name == record["name"] else f"they give the name {name}."


def _check_settings(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    if changed := differences(theirs, ours):
        raise ValueError(f"{path} is of other settings:\n  " + "\n  ".join(changed))
