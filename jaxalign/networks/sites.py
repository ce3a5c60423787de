"""Names for values inside a network, by which they can be read and changed from outside."""

from jax.ad_checkpoint import checkpoint_name

from jaxalign.types import Array


def site(x: Array, name: str) -> Array:
    """x[...] unchanged, under a name that `jaxalign.interpretability.capture` and `patch` find.

    It is JAX's own `checkpoint_name`, an identity that compiles to nothing, so any JAX function can have sites, however
    it is written: `h = site(jnp.tanh(x @ w), "hidden")`.
    """
    return checkpoint_name(x, name)
