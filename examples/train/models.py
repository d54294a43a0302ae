"""The networks (Flax Linen). Each names its first layer `stem` and its last `head`, so that rules
can.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def conv_init(key: Array, shape: Sequence[int], dtype: DTypeLike = "float32") -> Array:
    """He's initializer: normal, of variance 2 / (pixels · output channels).

    The numbers are drawn in one axis: to rounding they are those of Flax's own, and XLA compiles
    them ten times faster.
    """
    variance = jnp.array(2 / (math.prod(shape[:-2]) * shape[-1]), dtype)
    numbers = jax.random.normal(key, (math.prod(shape),), dtype)
    return (numbers * jnp.sqrt(variance)).reshape(shape)


Conv = partial(nn.Conv, use_bias=False, kernel_init=conv_init)
Convolve = Callable[..., Array]  # as `lax.conv_general_dilated`


class Network(nn.Module):
    """What the networks share.

    Attributes:
      classes: outputs.
      dtype: dtype to compute in; the params and the output are float32.
      bn_momentum: how much of the running statistics a step keeps; with 0 they are those of the
        last batch.
      convolve: how convolutions are computed; None for `lax.conv_general_dilated`.
    """

    classes: int
    dtype: DTypeLike = "float32"
    bn_momentum: float = 0.9
    convolve: Convolve | None = None

    def conv(self, width: int, size: tuple[int, int], stride: int, name: str) -> nn.Conv:
        """A convolution without a bias."""
        return Conv(
            width,
            size,
            stride,
            dtype=self.dtype,
            name=name,
            conv_general_dilated=self.convolve,
        )

    def norm(self, x: Array, train: bool, name: str | None = None) -> Array:
        """Batch normalization."""
        return nn.BatchNorm(not train, momentum=self.bn_momentum, dtype=self.dtype, name=name)(x)

    def head(self, x: Array) -> Array:
        """The classifier, on the mean over positions."""
        x = nn.Dense(self.classes, dtype=self.dtype, name="head")(jnp.mean(x, axis=(1, 2)))
        return x.astype(jnp.float32)


class Cnn(Network):
    """Four convolutions, for small images."""

    widths: Sequence[int] = (16, 32, 32, 64)

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i, width in enumerate(self.widths):
            stride = 2 if i in (1, 3) else 1
            name = "stem" if i == 0 else f"conv_{i}"
            x = self.conv(width, (3, 3), stride, name)(x)
            x = nn.relu(self.norm(x, train))
        return self.head(x)


class Vgg(Network):
    """VGG with batch normalization and one dense layer, as the BinaryRelax authors trained it on
    CIFAR.

    Attributes:
      plan: the widths of the convolutions; 0 halves the image.
    """

    plan: Sequence[int] = ()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        for i, width in enumerate(self.plan):
            if width:
                x = self.conv(width, (3, 3), 1, f"conv_{i}" if i else "stem")(x)
                x = nn.relu(self.norm(x, train))
            elif min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return self.head(x)


class ResNet(Network):
    """Residual networks (He et al., 2015), the large ones with the stride of a bottleneck in its
    convolution of 3 px, as is customary.

    Attributes:
      depths: blocks in each stage; from one stage to the next the image is halved and the width
        doubled.
      width: channels of the first stage.
      large: for 224 px: a stem of 7 px that quarters the image, and convolutions in the shortcuts
        between stages. For small images the shortcuts skip every other pixel and pad with channels
        of zeros.
      bottleneck: blocks of three convolutions, of 1, 3 and 1 px, the last with four times the
        width, in place of two of 3 px.
    """

    depths: Sequence[int] = ()
    width: int = 16
    large: bool = False
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        kernel, stride = ((7, 7), 2) if self.large else ((3, 3), 1)
        x = self.conv(self.width, kernel, stride, "stem")(x)
        x = nn.relu(self.norm(x, train))
        if self.large:
            x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self.block(
                    x, train, self.width * 2**stage, stride, f"stage{stage}_block{block}"
                )
        return self.head(x)

    def block(self, x: Array, train: bool, width: int, stride: int, name: str) -> Array:
        """relu(shortcut + two or three convolutions)."""
        y, last = x, 4 * width if self.bottleneck else width
        layers = [(width, 3, stride), (last, 3, 1)]  # channels, pixels, stride
        if self.bottleneck:
            layers = [(width, 1, 1), (width, 3, stride), (last, 1, 1)]
        for i, (channels, pixels, step) in enumerate(layers):
            y = nn.relu(y) if i else y
            y = self.conv(channels, (pixels, pixels), step, f"{name}_conv{i}")(y)
            y = self.norm(y, train)
        if x.shape != y.shape:
            x = self.shortcut(x, train, last, stride, f"{name}_shortcut")
        return nn.relu(x + y)

    def shortcut(self, x: Array, train: bool, width: int, stride: int, name: str) -> Array:
        """The input of a block in the shape of its output."""
        if self.large:
            x = self.conv(width, (1, 1), stride, name)(x)
            return self.norm(x, train)
        x = x[:, ::stride, ::stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))


MODELS: dict[str, Callable[..., Network]] = {
    "cnn": Cnn,
    **{f"resnet{6 * n + 2}": partial(ResNet, depths=(n, n, n)) for n in (1, 3, 5, 9)},
    "resnet8x2": partial(ResNet, depths=(1, 1, 1), width=32),
    "resnet18": partial(ResNet, depths=(2, 2, 2, 2), width=64, large=True),
    "resnet50": partial(ResNet, depths=(3, 4, 6, 3), width=64, large=True, bottleneck=True),
    "vgg11": partial(Vgg, plan=(64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)),
    "vgg16": partial(
        Vgg, plan=(64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
    ),
}  # fmt: skip


def make_model(name: str, classes: int, dtype: str = "float32") -> Network:
    """A network by its name.

    Raises:
      ValueError: if the name is not known.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}. Known: {', '.join(sorted(MODELS))}.")
    return MODELS[name](classes=classes, dtype=dtype)
