"""What the runs of the accuracy grid leave: a line each in the file of their study."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.runs import START, Run, neutral_settings, placed, settings_of
from examples.runs.log import Log, read
from examples.runs.studies import Study, in_order, sha256_of_json
from examples.train.config import Config, differences


def finished(run: Run) -> bool:
    """Whether the log of the run has its result."""
    path = Log(run.config.directory).path
    return path.exists() and any(line["kind"] == "result" for line in read(path))


def collect(run: Run) -> dict[str, Any]:
    """The line of a finished run, from its log.

    Raises:
      ValueError: if the log is of other settings.
    """
    path = Log(run.config.directory).path
    lines = read(path)
    header, result = lines[0], lines[-1]
    check_settings(str(path), settings_of(header["config"]), run.settings)
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
        "revision": run.revision,
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


class Results:
    """The studies in a directory: a file of JSON lines for each, with a line for each run.

    A study are the runs of one length, from a float start or from scratch; the float starts are one
    of their own.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def study(self, record: dict[str, Any]) -> Study:
        """The study that a run belongs to."""
        settings = record["settings"]
        words = [START] if record["method"] == START else [f"{settings['epochs']}ep"]
        if record["method"] != START and settings["warm_start"] is None:
            words.append("scratch")
        return Study(self.directory / f"{'-'.join(words)}.jsonl")

    def find(self, run: Run) -> dict[str, Any] | None:
        """The line of a run, of this revision of the algorithm; None if there is none.

        Raises:
          ValueError: if it is of other settings, or if a line of its study has been altered.
        """
        study = self.study({"method": run.method, "settings": run.settings})
        for record in study.read():
            if (record["name"], record["revision"]) == (run.name, run.revision):
                where = f"{study.path}: {run.name}"
                check_settings(where, settings_of(record["settings"]), run.settings)
                return record
        return None

    def add(self, record: dict[str, Any]) -> None:
        """Adds a run's line to its study."""
        self.study(record).add(record)

    def every(self) -> list[dict[str, Any]]:
        """All lines of all studies, in the order of their names.

        Raises:
          ValueError: if a line has been altered, or is not in its study's file.
        """
        found: list[dict[str, Any]] = []
        for path in sorted(self.directory.glob("*.jsonl")):
            for record in Study(path).read():
                if (study := self.study(record).path) != path:
                    raise ValueError(f"{path}: {record['name']} belongs in {study}: move its line.")
                found.append(record)
        return sorted(found, key=in_order)

    def import_jsons(self) -> None:
        """Takes up the JSON files of one run each that earlier versions wrote: adds their lines,
        and removes them.

        Raises:
          ValueError: if one has been altered, or contradicts a line that is there.
        """
        for path in sorted(self.directory.glob("*.json")):
            try:
                self.add(read_json(path))
            except FileNotFoundError:  # another process has taken it up
                continue
            except ValueError as error:
                raise ValueError(f"{path} is not taken up: {error}") from None
            path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The line of a run that an earlier version has left as a file.

    Raises:
      ValueError: if it has been altered.
    """
    try:
        record = json.loads(path.read_text())
        total, settings = record.pop("sha256"), record["settings"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not the JSON of a run ({error!r}).") from None
    if sha256_of_json(record) != total or record["name"] != path.stem:
        raise ValueError("it has been altered since it was written: remove it to repeat the run.")
    revision = None if settings["method"] == "float" else 1
    return {"name": record["name"], "revision": revision, **record}


def mistaken_name(record: dict[str, Any], base: Config) -> str | None:
    """What is wrong with the name of a line, if its settings give it another."""
    method, config = record["method"], config_of(record)
    neutral = base if method == START else neutral_settings(base, method)
    name = placed(method, config, neutral, ".").name
    return None if name == record["name"] else f"they give the name {name}."


def config_of(record: dict[str, Any]) -> Config:
    """The settings of a line."""
    settings = settings_of(record["settings"])
    settings["lr_drops"] = tuple(settings["lr_drops"])
    return Config(**settings)


def check_settings(where: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises a ValueError that says which settings differ, if any do."""
    if changed := differences(theirs, ours):
        raise ValueError(f"{where} is of other settings:\n  " + "\n  ".join(changed))
