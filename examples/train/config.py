"""All settings of a training run, as one frozen dataclass, and named presets of them."""

import dataclasses
import json
from typing import Any

from examples.runs import settings
from examples.runs.settings import setting


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run. Times are in epochs, and may be fractions of one."""

    dataset: str = setting(
        "digits",
        "data",
        "digits, cifar10, cifar100, imagenet2012, or a TFDS image classification dataset",
    )
    image_size: int | None = setting(
        None, "data", "resize images to squares of this side, in pixels"
    )
    train_examples: int | None = setting(None, "data", "train on this many examples only")
    validation: float = setting(
        0.1, "data", "share of the training split held out to choose settings on; 0: none"
    )
    augment: bool = setting(
        True, "data", "shift images at random (crop those of a stream), and flip colour images"
    )
    stream: str = setting(
        "auto",
        "data",
        "read and decode images in threads while training, as random resized crops; auto: if all "
        "images take more than 4 GiB",
        ("auto", "yes", "no"),
    )

    model: str = setting(
        "cnn",
        "model",
        "cnn, vgg11, vgg16, resnet8, resnet20, resnet32, resnet56, resnet8x2 (of twice the width); "
        "for 224 px resnet18, resnet50",
    )
    dtype: str = setting(
        "float32", "model", "dtype to compute in; params stay float32", ("float32", "bfloat16")
    )

    method: str = setting(
        "binary_relax",
        "quantization",
        "how the weights are trained",
        ("float", "binary_connect", "binary_relax", "parq", "proxquant"),
    )
    set: str = setting(
        "binary",
        "quantization",
        "binary, ternary, ternary-threshold, uniform2..8, power2..5, as levels:-3,-1,1,3, or a "
        "format such as q4_0 or mxfp4 (which has its own granularity); after an @ the rule for the "
        "scale: best, mean:FACTOR, mean:FACTOR:norefit, max or fixed:SCALE, as in ternary@mean:1.4",
    )
    granularity: str = setting(
        "tensor",
        "quantization",
        "weights that share a scale: tensor, channel[:AXIS] or block:SIZE[:AXIS]",
    )
    tolerance: float = setting(
        0.0,
        "quantization",
        "keep the previous scale, refitted, while its squared error is within this relative "
        "distance of the optimum; for sets of three or more levels",
    )
    first: str = setting(
        "same", "quantization", "the first layer's set: same, float, or a set's name"
    )
    last: str = setting(
        "float", "quantization", "the last layer's set: same, float, or a set's name"
    )
    lam_schedule: str | None = setting(
        None,
        "quantization",
        "growth of λ, or of the strength from 0 to 1 (sigmoid with --method parq; else linear from "
        "scratch, and geometric with --warm-start; geometric if one of its numbers is given)",
        ("geometric", "linear", "cosine", "sigmoid"),
    )
    lam_start: float = setting(1.0, "quantization", "geometric: λ in the first step")
    lam_end: float = setting(
        100.0, "quantization", "geometric: λ when phase II begins, if no growth is given"
    )
    lam_growth: float | None = setting(
        None, "quantization", "geometric: factor of λ from epoch to epoch"
    )
    lam_steepness: float = setting(10.0, "quantization", "sigmoid: its steepness")
    hard_from: float | None = setting(
        None,
        "quantization",
        "epoch at which phase II begins: weights are exactly quantized (three quarters of epochs)",
    )
    hard_lr: float | None = setting(None, "quantization", "limit of the learning rate in phase II")
    hold: float = setting(
        0.0,
        "quantization",
        "hold a float weight for good if its code goes back and forth in more than this share of "
        "recent steps, at the end in a quarter of it; 0: never",
    )

    epochs: int = setting(30, "training", "passes over the training split")
    batch: int = setting(128, "training", "images in a step")
    lr: float = setting(0.1, "training", "learning rate at the start")
    lr_schedule: str = setting(
        "cosine",
        "training",
        "cosine to 0; restart: cosine to 0 in phase I, and again in phase II; drops: divided by "
        "ten at each drop",
        ("cosine", "restart", "drops"),
    )
    lr_drops: tuple[float, ...] = setting((), "training", "epochs of the drops, as in 80,140")
    momentum: float = setting(0.9, "training", "momentum of SGD")
    weight_decay: float = setting(1e-4, "training", "L2 weight decay, on the float weights")
    average: float = setting(
        0.0,
        "training",
        "deploy the average of the float weights of so many last epochs; 0: the last ones",
    )
    warm_start: str | None = setting(
        None, "training", "start from the weights of the run in this directory"
    )
    seed: int = setting(0, "training", "seed of the weights, the order and the augmentation")

    mesh: str = setting(
        "1x1",
        "training",
        "devices, DATAxMODEL: batches are split over the first, output channels over the second",
    )

    out: str | None = setting(
        None, "output", "directory of this run (runs/DATASET-MODEL-METHOD[-SET])"
    )
    checkpoint_every: int = setting(
        1, "output", "epochs from one checkpoint to the next; the last two are kept"
    )
    statistics_batches: int = setting(
        20,
        "output",
        "number of training batches for re-estimating the batch statistics of quantized weights",
    )
    metrics_every: int | None = setting(
        None,
        "output",
        "log metrics of the layers every so many steps (an epoch); 0: never, which saves a byte a "
        "weight, and reading and writing it in each step",
    )
    tensorboard: bool = setting(
        False, "output", "also write the log as an event file for TensorBoard"
    )

    @property
    def directory(self) -> str:
        """Where the run's log, checkpoints and plots go."""
        words = [
            self.dataset,
            self.model,
            self.method,
            *([] if self.method == "float" else [self.set]),
        ]
        return self.out or "runs/" + "-".join(words).replace("/", "_").replace(":", "")

    def steps_per_epoch(self, examples: int) -> int:
        """Whole batches in so many examples; fewer than one batch make a smaller one."""
        return max(examples // self.batch, 1)

    def images_per_epoch(self, examples: int) -> int:
        """How many of so many examples an epoch trains on."""
        return self.steps_per_epoch(examples) * min(self.batch, examples)

    def metrics_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether metrics of the layers are logged after so many steps."""
        every = steps_per_epoch if self.metrics_every is None else self.metrics_every
        return self.method != "float" and every > 0 and step % every == 0

    @property
    def hard_epoch(self) -> float:
        """The epoch at which phase II begins."""
        return 0.75 * self.epochs if self.hard_from is None else self.hard_from

    @property
    def deploys_as_trained(self) -> bool:
        """Whether the params to deploy are those of the last step, with their statistics."""
        return self.method == "float" and not self.average

    @property
    def lam_shape(self) -> str:
        """How λ grows: from scratch networks end better if it begins at 0, from float weights if it
        begins higher (docs/accuracy_tables.md). PARQ has its own schedule.
        """
        changed = any(
            getattr(self, name) != getattr(Config, name)
            for name in ("lam_start", "lam_end", "lam_growth")
        )
        if self.method == "parq" and not changed:
            return self.lam_schedule or "sigmoid"
        geometric = self.warm_start is not None or changed
        return self.lam_schedule or ("geometric" if geometric else "linear")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON keeps them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


PRESETS: dict[str, dict[str, Any]] = {
    # Two minutes of anything: scikit-learn's digits, which need no download.
    "quick": dict(dataset="digits", model="cnn", batch=64),
    # Five epochs of CIFAR-10: some minutes on two cores.
    "short": dict(dataset="cifar10", model="resnet8", epochs=5, validation=0.0),
    # The authors' recipe. Train it with --method float first, then --warm-start from that run.
    "paper": dict(
        dataset="cifar10", model="vgg11", validation=0.0, set="binary", granularity="tensor",
        first="same", last="float", lam_start=1.04, lam_growth=1.04, hard_from=150.0, epochs=200,
        batch=128, lr=0.1,
        lr_schedule="drops", lr_drops=(80.0, 140.0), momentum=0.9, weight_decay=1e-4,
    ),
    # PARQ's recipe for CIFAR, with their version of BinaryRelax; for PARQ: --lam-schedule sigmoid.
    "parq": dict(
        dataset="cifar10", model="resnet20", validation=0.0, granularity="tensor",
        first="same", last="same", lam_schedule="linear", lam_steepness=100.0, hard_from=150.0,
        epochs=200, batch=128, lr=0.1,
        lr_schedule="drops", lr_drops=(80.0, 120.0, 150.0), momentum=0.9, weight_decay=2e-4,
    ),
    # PARQ's recipe for ImageNet, which is the customary one. Without a phase II.
    "imagenet": dict(
        dataset="imagenet2012", model="resnet50", image_size=224, validation=0.0,
        granularity="channel", first="float", last="float",
        lam_schedule="linear", lam_steepness=75.0, hard_from=90.0, epochs=90, batch=256, lr=0.1,
        lr_schedule="drops", lr_drops=(30.0, 60.0), momentum=0.9, weight_decay=1e-4,
    ),
}  # fmt: skip


ELSEWHERE = ("out", "mesh", "tensorboard")  # say where a run computes and writes, not what


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Lines that say which settings differ between two runs, those of the place apart."""
    return settings.differences(without_places(theirs), without_places(ours), Config().to_json())


def without_places(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that say what a run computes."""
    return {name: value for name, value in config.items() if name not in ELSEWHERE}
