"""The training program, killed by SIGKILL at a moment that can be chosen: when it is about to make
its n-th change to the files of its run.

`python -m tests.helpers.killed N PATTERN ARGUMENTS`: of the changes only those count that match
PATTERN, as in `os.rename .*/4[.]`. With `--metrics-every 1` there is one in every step of the
training.
"""

import itertools
import os
import re
import signal
import sys
from functools import partial
from typing import Any

from examples.train import __main__ as train
from examples.train.models import MODELS, Cnn

TINY = "tiny"  # a network of three layers, also for those who import this module
MODELS[TINY] = partial(Cnn, widths=(4, 8))

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def change(event: str, args: tuple[Any, ...], directory: str) -> str | None:
    """An audit event as 'EVENT PATH' if it changes something in a directory."""
    if event not in CHANGES or not isinstance(args[0], str | os.PathLike):
        return None
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return None
    path = os.fspath(args[0])
    in_a_tree = not os.path.isabs(path)  # shutil.rmtree names what it removes relative to a file
    return f"{event} {path}" if in_a_tree or path.startswith(directory) else None


def main(nth: int, pattern: str, *arguments: str) -> int:
    """Runs the program with these arguments, `--out` the first of them; 0 never kills."""
    directory, numbers = arguments[1], itertools.count(1)
    last = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal last
        found = change(event, args, directory)
        if found is None or re.search(pattern, found) is None:
            return
        last = next(numbers)
        if last == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    status = train.main(arguments)
    print(f"changes: {last}")
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
