"""Where the weights must land: quantized sets, and which weights share a scale."""

from brelax_jax.sets._base import QuantizedSet as QuantizedSet
from brelax_jax.sets._fit import FLOATS as FLOATS
from brelax_jax.sets._fit import compute_dtype as compute_dtype
from brelax_jax.sets._fit import promoted as promoted
from brelax_jax.sets._granularity import Granularity as Granularity
from brelax_jax.sets._granularity import PerBlock as PerBlock
from brelax_jax.sets._granularity import PerChannel as PerChannel
from brelax_jax.sets._granularity import PerTensor as PerTensor
from brelax_jax.sets._granularity import groups_of as groups_of
from brelax_jax.sets._group import Group as Group
from brelax_jax.sets._quantized import Quantized as Quantized
from brelax_jax.sets._rules import Fit as Fit
from brelax_jax.sets._rules import Fixed as Fixed
from brelax_jax.sets._rules import LeastSquares as LeastSquares
from brelax_jax.sets._rules import MaxMagnitude as MaxMagnitude
from brelax_jax.sets._rules import MeanMagnitude as MeanMagnitude
from brelax_jax.sets._rules import ScaleRule as ScaleRule
from brelax_jax.sets._sets import Binary as Binary
from brelax_jax.sets._sets import PowerOfTwo as PowerOfTwo
from brelax_jax.sets._sets import ScaledLevels as ScaledLevels
from brelax_jax.sets._sets import Ternary as Ternary
from brelax_jax.sets._sets import TernaryThreshold as TernaryThreshold
from brelax_jax.sets._sets import Uniform as Uniform
