"""Names for the values that pass between the contracts."""

from typing import Any

import jax

Array = jax.Array
ArrayLike = jax.typing.ArrayLike
Key = jax.Array  # a typed PRNG key, as jax.random.key makes it
Params = Any  # any pytree of arrays
Metrics = dict[str, Array]

EPISODE = "episode/"  # begins the name of a metric over the episodes that ended in a step: NaN where none did
