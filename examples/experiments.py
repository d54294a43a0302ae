"""The published experiments, as command lines: `python -m examples.experiments [PATTERN]`.

An experiment's name is DATASET-MODEL-float or DATASET-MODEL-SET-METHOD. A pattern, as in
`cifar10-resnet20-ternary-*`, prints the commands of all that it matches; options after it, such as
`--seed 1 --mesh 8x1 --dtype bfloat16`, go to each of them. Pipe them into `sh -e` to run them.
"""

import fnmatch
import itertools
import shlex
import sys
from collections.abc import Sequence

from brelax_jax._command_line import Parser
from examples.train.cli import parse

CIFAR = ("cifar10", "cifar100")
PRESETS: dict[tuple[str, str], str] = {
    **dict.fromkeys(itertools.product(CIFAR, ("vgg11", "vgg16")), "paper"),
    **dict.fromkeys(itertools.product(CIFAR, ("resnet20", "resnet32", "resnet56")), "parq"),
    **dict.fromkeys(itertools.product(("imagenet2012",), ("resnet18", "resnet50")), "imagenet"),
}
SETS = {
    "binary": "binary",
    "ternary": "ternary",
    "2bits": "levels:-3,-1,1,3",
    "3bits": "uniform3",
    "4bits": "uniform4",
}
METHODS = ("binary_connect", "binary_relax", "parq")

NAMES = [
    "-".join((*network, *rest))
    for network in PRESETS
    for rest in [("float",), *itertools.product(SETS, METHODS)]
]


def arguments(name: str, seed: int = 0, runs: str = "runs/published") -> list[str]:
    """The arguments of `python -m examples.train` for an experiment.

    Raises:
      ValueError: if the name is not known.
    """
    if name not in NAMES:
        raise ValueError(f"Unknown experiment {name!r}. Known: {known()}")
    dataset, model, *qset, method = name.split("-")
    preset = PRESETS[dataset, model]
    words = ["--preset", preset, "--dataset", dataset, "--model", model, "--method", method]
    if qset:
        words += ["--set", SETS[qset[0]]]
    if method == "parq":
        words += ["--lam-schedule", "sigmoid"]
    if (preset, method) == ("parq", "float"):
        words += ["--lr-drops", "100,150"]
    if preset == "paper" and qset:
        words += ["--warm-start", f"{runs}/{dataset}-{model}-float/seed{seed}"]
    return [*words, "--seed", str(seed), "--out", f"{runs}/{name}/seed{seed}"]


def known() -> str:
    """What names are made of."""
    return (
        "DATASET-MODEL-float and DATASET-MODEL-SET-METHOD, with\n"
        f"  DATASET-MODEL: {', '.join(map('-'.join, PRESETS))}\n"
        f"  SET: {', '.join(SETS)}\n"
        f"  METHOD: {', '.join(METHODS)}"
    )


def main(given: Sequence[str] | None = None) -> int:
    """Prints commands; returns the exit status."""
    parser = Parser(
        "examples.experiments",
        f"{__doc__}\nThe names: {known()}",
        "cifar10-vgg11-float | sh -e",
        "'cifar10-resnet20-ternary-*' --seed 1 --dtype bfloat16",
    )
    parser.add_argument("pattern", nargs="?", help="names to print, with * and ?; all if left out")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of each run")
    parser.add_argument(
        "--runs", default="runs/published", metavar="DIRECTORY", help="directory of the runs"
    )
    options, more = parser.parse_known_args(given)
    names = fnmatch.filter(NAMES, options.pattern or "*")
    if not names:
        print(f"Error: no experiment is {options.pattern!r}. Known: {known()}", file=sys.stderr)
        return 2
    for name in names:
        words = [*arguments(name, options.seed, options.runs), *more]
        parse(words)  # reports options that training does not know
        print(shlex.join(["python", "-m", "examples.train", *words]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
