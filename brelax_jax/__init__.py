"""BinaryRelax for Optax: train networks whose weights end up exactly on quantized sets.

Data flows one way: which leaves (`select`) → where they must land (the sets) → how hard they are
pulled (the proximal maps, the continuation schedules) → the Optax face (`binary_relax`) → what
leaves (`save`, `pack`, `export`).
"""

from brelax_jax import export as export
from brelax_jax import formats as formats
from brelax_jax._envelope import distance as distance
from brelax_jax._envelope import moreau_envelope as moreau_envelope
from brelax_jax._envelope import relax as relax
from brelax_jax._metrics import LeafMetrics as LeafMetrics
from brelax_jax._metrics import metrics as metrics
from brelax_jax._proximal import PiecewiseAffine as PiecewiseAffine
from brelax_jax._proximal import ProximalMap as ProximalMap
from brelax_jax._proximal import Relaxation as Relaxation
from brelax_jax._proximal import SoftThreshold as SoftThreshold
from brelax_jax._schedules import Continuation as Continuation
from brelax_jax._schedules import continuation as continuation
from brelax_jax._schedules import cosine_continuation as cosine_continuation
from brelax_jax._schedules import geometric_continuation as geometric_continuation
from brelax_jax._schedules import linear_continuation as linear_continuation
from brelax_jax._schedules import sigmoid_continuation as sigmoid_continuation
from brelax_jax._select import Selection as Selection
from brelax_jax._select import select as select
from brelax_jax.export import Packed as Packed
from brelax_jax.export import dequantize as dequantize
from brelax_jax.export import load as load
from brelax_jax.export import pack as pack
from brelax_jax.export import save as save
from brelax_jax.sets import Binary as Binary
from brelax_jax.sets import Fixed as Fixed
from brelax_jax.sets import LeastSquares as LeastSquares
from brelax_jax.sets import MaxMagnitude as MaxMagnitude
from brelax_jax.sets import MeanMagnitude as MeanMagnitude
from brelax_jax.sets import PerBlock as PerBlock
from brelax_jax.sets import PerChannel as PerChannel
from brelax_jax.sets import PerTensor as PerTensor
from brelax_jax.sets import PowerOfTwo as PowerOfTwo
from brelax_jax.sets import Quantized as Quantized
from brelax_jax.sets import QuantizedSet as QuantizedSet
from brelax_jax.sets import ScaledLevels as ScaledLevels
from brelax_jax.sets import ScaleRule as ScaleRule
from brelax_jax.sets import Ternary as Ternary
from brelax_jax.sets import TernaryThreshold as TernaryThreshold
from brelax_jax.sets import Uniform as Uniform
from brelax_jax.transforms import BinaryRelaxState as BinaryRelaxState
from brelax_jax.transforms import binary_connect as binary_connect
from brelax_jax.transforms import binary_relax as binary_relax
from brelax_jax.transforms import float_params as float_params
from brelax_jax.transforms import parq as parq
from brelax_jax.transforms import quantized_params as quantized_params
from brelax_jax.transforms import quantized_tree as quantized_tree
from brelax_jax.transforms import relax_params as relax_params
from brelax_jax.transforms import strength as strength
from brelax_jax.transforms import with_float_params as with_float_params
from brelax_jax.transforms import with_rules as with_rules

__version__ = "0.2.0"
__revision__ = 1  # of the algorithm: raised when the same settings train to other weights
