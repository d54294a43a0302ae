"""The report on the accuracy grid, from the lines of its runs alone.

Accuracy is that of the deployed network after the last step, on the test split. The study's table,
from which settings are chosen, is of the validation split.
"""

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.plots import plot_bits, plot_curves, plot_pull
from benchmarks.accuracy.records import Results, config_of, mistaken_name
from benchmarks.accuracy.runs import FIELDS, NAMED, START, Run, make_run, set_name, with_starts
from examples.runs.studies import current, other_revisions
from examples.train.config import Config

CONTINUED, CONNECT = "float-continued", "binary_connect"
TITLES = {
    START: "float, where all start", CONTINUED: "float, as long", CONNECT: "BinaryConnect",
    "binary_relax": "BinaryRelax", "parq": "PARQ", "proxquant": "ProxQuant",
}  # fmt: skip
NONE = "–"
PAGE = "accuracy_tables.md"
Row = dict[int, dict[str, Any]]  # lines by seed


def report(runs: Sequence[Run], results: Results, docs: str, tag: str) -> str:
    """Writes the table into docs/accuracy_tables.md and draws the plots; returns the table.

    Raises:
      ValueError: if a line is of other settings, or if there is none.
    """
    rows = read_rows(with_starts(runs), results)
    quantized = {key: row for key, row in rows.items() if key[0]}
    there = {record["name"] for row in rows.values() for record in row.values()}
    missing = [run.name for run in runs if run.name not in there]
    text = table(accuracy_rows(rows))
    if missing:
        text += f"\n\nNot there yet ({len(missing)} of {len(runs)}): {', '.join(missing)}."
    names = {run.name for run in runs}
    if left_out := other_revisions([r for r in results.every() if r["name"] in names]):
        text += f"\n\n{left_out}"
    every = list(itertools.chain.from_iterable(row.values() for row in rows.values()))
    text += "\n\n" + origin(every)
    Path(docs).mkdir(parents=True, exist_ok=True)
    if quantized:
        pictures = {
            "Accuracy by bits a weight": plot_bits,
            "Validation accuracy over epochs": plot_curves,
            "Distance to the set, and flips": plot_pull,
        }
        for title, plot in pictures.items():
            name = f"accuracy-{tag}-{plot.__name__.removeprefix('plot_')}.png"
            plot(rows, TITLES, Path(docs) / name)
            text += f"\n\n![{title}]({name})"
    insert(Path(docs) / PAGE, tag, text)
    return text


def read_rows(runs: Iterable[Run], results: Results) -> dict[tuple[str, str], Row]:
    """The lines that are there, by set ('' for float runs) and method, then by seed."""
    rows: dict[tuple[str, str], Row] = {}
    for run in runs:
        if record := results.find(run):
            of_set = "" if run.config.method == "float" else set_name(run.config.set)
            rows.setdefault((of_set, run.method), {})[run.config.seed] = record
    if not rows:
        raise ValueError(
            f"There is no line of these runs in {results.directory}: train them first."
        )
    return rows


def accuracy_rows(rows: Mapping[tuple[str, str], Row]) -> list[dict[str, str]]:
    """The table's rows: a method on a set, and how it compares."""
    found: list[dict[str, str]] = []
    for (of_set, method), row in rows.items():
        accuracy = accuracies(row)
        connect = accuracies(rows.get((of_set, CONNECT), {}))
        compared = method not in (START, CONTINUED, CONNECT)
        tops = [accuracies(rows.get(("", top), {})) for top in (START, CONTINUED)]
        closed = [gap_closed(accuracy, connect, top) if compared else None for top in tops]
        found.append(
            {
                "set": of_set or NONE,
                "method": TITLES.get(method, method),
                "bits a weight": f"{next(iter(row.values()))['bits_per_weight']:.3g}",
                "test accuracy": spread(accuracy),
                "n": str(len(accuracy)),
                "by seed": by_seed(accuracy),
                "not deployed": spread(accuracies(row, "test_current")),
                "minus BinaryConnect": difference(accuracy, connect) if compared else NONE,
                "of the gap to the start": percent(closed[0]),
                "of the gap to float, as long": percent(closed[1]),
            }
        )
    return found


def accuracies(row: Row, name: str = "test_deployed") -> dict[int, float]:
    """Accuracies in percent by seed; NaN for a run that diverged."""
    return {
        seed: math.nan if record["diverged"] else 100 * record[name] for seed, record in row.items()
    }


def spread(values: Mapping[int, float]) -> str:
    """Mean and standard deviation over the seeds. Runs that diverged are not left out of a mean:
    there is none.
    """
    if not values:
        return NONE
    diverged = sum(map(math.isnan, values.values()))
    if diverged:
        return f"diverged ({diverged} of {len(values)})"
    deviation = f" ± {statistics.stdev(values.values()):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.2f}{deviation}"


def by_seed(values: Mapping[int, float]) -> str:
    """Each seed's, in order."""
    return ", ".join(
        f"{seed}: " + ("diverged" if math.isnan(value) else f"{value:.2f}")
        for seed, value in sorted(values.items())
    )


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Differences by seed, over the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs]


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """The mean of the paired differences and its standard error."""
    differences = paired(ours, theirs)
    if not differences or any(map(math.isnan, differences)):
        return NONE
    error = ""
    if len(differences) > 1:
        error = f" ± {statistics.stdev(differences) / math.sqrt(len(differences)):.2f}"
    return f"{statistics.fmean(differences):+.2f}{error} (n = {len(differences)})"


def gap_closed(
    ours: Mapping[int, float], connect: Mapping[int, float], top: Mapping[int, float]
) -> float | None:
    """The share of BinaryConnect's gap to float that is closed, over the seeds that all have; None
    if there is no gap.
    """
    seeds = ours.keys() & connect.keys() & top.keys()
    gap = sum(top[seed] - connect[seed] for seed in seeds)
    if not gap > 0:  # or NaN
        return None
    share = sum(ours[seed] - connect[seed] for seed in seeds) / gap
    return None if math.isnan(share) else share


def percent(share: float | None) -> str:
    """A share, as a percentage."""
    return NONE if share is None else f"{share:.0%}"


def origin(records: Sequence[dict[str, Any]]) -> str:
    """The versions and the devices of the runs."""
    versions = sorted(
        {f"{name} {version}" for record in records for name, version in record["versions"].items()}
    )
    devices = sorted({record["device"] for record in records})
    hours = sum(record["seconds"] for record in records) / 3600
    return (
        f"{len(records)} runs, {hours:.2g} hours of training on {', '.join(devices)}; "
        f"{', '.join(versions)}."
    )


def study(results: Results, base: Config, docs: str, tag: str) -> str:
    """Writes the table of all runs in the results by validation accuracy after the last epoch into
    docs/accuracy_tables.md; returns it.

    Raises:
      ValueError: if a line has been altered, or is of another base.
    """
    families: dict[str, Row] = {}
    every = results.every()
    for record in filter(current, every):
        if problem := mistaken_name(record, base):
            raise ValueError(f"{record['name']} is of other settings: {problem}")
        family = record["name"].rpartition("-seed")[0]
        families.setdefault(family, {})[record["settings"]["seed"]] = record
    if not families:
        raise ValueError(f"There is no line of a run in {results.directory}: train first.")
    found = {name: last(row, "validation_deployed") for name, row in families.items()}
    rows: list[dict[str, str]] = []
    for name, row in families.items():
        unchanged, connect = compared(next(iter(row.values())), base)
        rows.append(
            {
                "runs": name,
                "validation accuracy": spread(found[name]),
                "by seed": by_seed(found[name]),
                "not deployed": spread(last(row, "validation_current")),
                "minus without changes": versus(found, name, unchanged),
                "minus BinaryConnect": versus(found, name, connect),
                "test accuracy": spread(accuracies(row)),
            }
        )
    text = table(rows)
    if left_out := other_revisions(every):
        text += f"\n\n{left_out}"
    Path(docs).mkdir(parents=True, exist_ok=True)
    insert(Path(docs) / PAGE, tag, text)
    return text


def compared(record: dict[str, Any], base: Config) -> tuple[str, str]:
    """The families that a run's is compared with: without its changes, of which the learning rate
    stays beside others, and BinaryConnect in the same settings.
    """
    if record["method"] == START:
        return START, START
    config = config_of(record)
    start: dict[str, Any] = {} if config.warm_start else {"warm_start": None}
    changes = {name: getattr(config, name) for name in FIELDS if name not in NAMED} | start
    about = (config.set, config.seed, config.epochs)

    def family(method: str, changes: dict[str, Any]) -> str:
        return make_run(base, method, *about, changes, "").name.rpartition("-seed")[0]

    own = record["name"].rpartition("-seed")[0]
    unchanged = family(record["method"], start | {"lr": config.lr})
    if unchanged == own:
        unchanged = family(record["method"], start)
    return unchanged, family(CONNECT, changes)


def last(row: Row, name: str) -> dict[int, float]:
    """A curve's last value in percent by seed; NaN for a run that diverged."""
    return {
        seed: math.nan if record["diverged"] else 100 * record["curve"][name][-1]
        for seed, record in row.items()
    }


def versus(found: Mapping[str, Mapping[int, float]], name: str, other: str) -> str:
    """The paired difference of two families of runs, if they are two."""
    return difference(found[name], found.get(other, {})) if other != name else NONE


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows in Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def insert(path: Path, tag: str, text: str) -> None:
    """Puts a text between the marks of its tag; without such marks, at the end of the page."""
    begin, end = f"<!-- {tag}: begin -->", f"<!-- {tag}: end -->"
    block = f"{begin}\n{text}\n{end}"
    page = path.read_text() if path.exists() else "# Accuracy\n"
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if marked.search(page):
        page = marked.sub(lambda _: block, page)
    else:
        page = f"{page.rstrip()}\n\n{block}\n"
    path.write_text(page)
