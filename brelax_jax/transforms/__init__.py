"""The Optax face: gradient transformations, their state, and what can be read from it."""

from brelax_jax.transforms._accessors import float_params as float_params
from brelax_jax.transforms._accessors import quantized_params as quantized_params
from brelax_jax.transforms._accessors import quantized_tree as quantized_tree
from brelax_jax.transforms._accessors import strength as strength
from brelax_jax.transforms._accessors import with_float_params as with_float_params
from brelax_jax.transforms._carry import with_rules as with_rules
from brelax_jax.transforms._methods import binary_connect as binary_connect
from brelax_jax.transforms._methods import parq as parq
from brelax_jax.transforms._methods import relax_params as relax_params
from brelax_jax.transforms._relax import binary_relax as binary_relax
from brelax_jax.transforms._state import BinaryRelaxState as BinaryRelaxState
