"""The results of a study: a file of JSON lines, one a run, each with its SHA-256."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import brelax_jax

REVISION = brelax_jax.__revision__  # another one makes other weights of the same settings


class Study:
    """A file of JSON lines, in the order of their names.

    A line is a dictionary with at least the `name` of a run and the `revision` of the algorithm
    that it was trained with; None for a float run, which does not depend on it.

    The file is there with a line or without it, whenever a process is killed, and several processes
    may add lines at the same time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """All lines.

        Raises:
          ValueError: if a line has been altered, or is there twice; it names the file, the line's
            number and the run.
        """
        try:
            text = self.path.read_text(errors="replace")
        except FileNotFoundError:
            return []
        records = [self._checked(i, line) for i, line in enumerate(text.splitlines(), start=1)]
        keys = [key(record) for record in records]
        if twice := next((k for i, k in enumerate(keys) if k in keys[:i]), None):
            raise ValueError(f"{self.path} has two lines of {twice[0]}: remove one of them.")
        return records

    def add(self, record: dict[str, Any]) -> None:
        """Adds a line, unless just this line is there.

        Raises:
          ValueError: if another line of the same run and revision is there, or one is altered.
        """
        record = json.loads(json.dumps(record, allow_nan=False))
        with locked(self.path.parent):
            found = {key(each): each for each in self.read()}
            there = found.setdefault(key(record), record)
            if there != record:
                raise ValueError(
                    f"{self.path} holds another line of {record['name']}: remove one of the two."
                )
            beside = self.path.with_name(self.path.name + ".new")
            beside.write_text("".join(map(as_line, sorted(found.values(), key=in_order))))
            os.replace(beside, self.path)

    def _checked(self, number: int, line: str) -> dict[str, Any]:
        named = re.search(r'"name": "(.*?)"', line)
        where = f"{self.path}, line {number} ({named[1] if named else 'no name'})"
        try:
            record = json.loads(line)
            total = record.pop("sha256")
            key(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where}, cannot be read ({error!r}): remove the line to repeat the run."
            ) from None
        if sha256_of_json(record) != total:
            raise ValueError(
                f"{where}, has been altered since it was written: remove the line to repeat the "
                "run."
            )
        return record


def current(record: dict[str, Any]) -> bool:
    """Whether a line is of this revision of the algorithm, or does not depend on it."""
    return record["revision"] in (None, REVISION)


def other_revisions(records: list[dict[str, Any]]) -> str:
    """A sentence that names the lines of other revisions; nothing if there are none."""
    names = [f"{r['name']} (revision {r['revision']})" for r in records if not current(r)]
    if not names:
        return ""
    return (
        f"Left out, because this is revision {REVISION} of the algorithm ({len(names)}): "
        f"{', '.join(names)}."
    )


def key(record: dict[str, Any]) -> tuple[str, int | None]:
    """What no two lines of a study share."""
    return record["name"], record["revision"]


def in_order(record: dict[str, Any]) -> tuple[str, int]:
    """What lines are sorted by."""
    return record["name"], record["revision"] or 0


def as_line(record: dict[str, Any]) -> str:
    """A line with its SHA-256."""
    return json.dumps({**record, "sha256": sha256_of_json(record)}) + "\n"


def sha256_of_json(value: Any) -> str:
    """The SHA-256 of what JSON can keep, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(directory: Path) -> Generator[None, None, None]:
    """Keeps other processes from changing a directory's files, until the end of the block or of
    the process.
    """
    import fcntl  # which Windows lacks; training has no need of it

    directory.mkdir(parents=True, exist_ok=True)
    place = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)
