"""All settings of a language model's run."""

import dataclasses
import math

from examples.runs import sets
from examples.runs.settings import flag, setting


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run computes."""

    width: int = setting(128, "model", "size of the vector of a character")
    layers: int = setting(4, "model", "blocks of attention and dense layers")
    heads: int = setting(4, "model", "heads of each attention")
    context: int = setting(64, "model", "characters that a prediction may look at")
    batch: int = setting(16, "training", "pieces of text in a step")
    steps: int = setting(1000, "training", "steps of the float network")
    further_steps: int = setting(1000, "training", "steps of each network that starts from it")
    warmup: int = setting(100, "training", "steps over which a learning rate grows")
    lr: float = setting(4e-3, "training", "highest learning rate")
    further_lr: float = setting(
        0.0, "training", "highest learning rate of each network that starts from it; 0: --lr"
    )
    weight_decay: float = setting(0.01, "training", "AdamW's, on the float weights")
    sets: tuple[str, ...] = setting(
        ("q2_0",),
        "quantization",
        "sets on which kernels end, as in examples.train: formats of llama.cpp such as tq2_0 and "
        "q4_0, or others, such as ternary, with one scale for each output channel",
    )
    shape: str = setting(
        "geometric", "quantization", "growth of λ", ("geometric", "linear", "cosine", "sigmoid")
    )
    hard_share: float = setting(
        0.25, "quantization", "share of the steps that is phase II, exactly quantized"
    )

    def check(self) -> None:
        """Raises a ValueError, naming the option, if a number is out of its range."""
        ones = dict.fromkeys(("width", "layers", "heads", "batch", "steps", "further_steps"), 1)
        zeros = dict.fromkeys(("warmup", "weight_decay", "further_lr"), 0)
        for name, least in {**ones, "context": 2, **zeros}.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{flag(name)} must be at least {least}, got {getattr(self, name)}."
                )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be positive, got {self.lr}.")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"--heads {self.heads} must divide half of --width {self.width}: pairs are turned."
            )
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"--hard-share must be from 0 to 1, got {self.hard_share}.")
        if self.warmup >= min(self.steps, self.further_steps):
            raise ValueError(
                f"--warmup must be less than the steps of each network, got {self.warmup}."
            )
        for word in self.sets:
            sets.parse_set(word)
