"""What a model would say if it stopped after each layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithm import Network
from jaxalign.interpretability.activations import capture, patch
from jaxalign.types import Array, Params


def logit_lens(
    network: Network,
    params: Params,
    *inputs: Array,
    site: str = "resid_post",
    read: Callable[[Any], Any] = lambda logits: logits,
) -> Any:
    """The network's output with the residual stream after each layer in place of the last: logits [L, B, T, V].

    out[l] = read(unembed(final_norm(x_l))), x_l = the value of `site` after layer l, by the network's own last steps;
    out[L - 1] is the network's own output (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Args:
        inputs: what apply takes after `params`: tokens [B, T].
        site: a site that occurs in each of L layers and whose last value alone decides the output.
        read: what is kept of each layer's output, such as `lambda logits: logits[:, -1]` or one token's
            log-probability; layers are read one after another, so that [L, B, T, V] need never be held.

    Raises ValueError naming the sites if there is no such site, or if it occurs once only.
    """
    values = capture(network, (site,)).apply(params, *inputs)[1][site]
    last = f"{site}[{len(values) - 1}]"
    # Under jit the layers are computed once, above: what a replaced value was computed from is dropped as unused.
    return jax.lax.map(lambda x: read(patch(network, {last: lambda _: x}).apply(params, *inputs)), values)


def layer_log_probs(
    network: Network, params: Params, tokens: Array, targets: Array, *, site: str = "resid_post"
) -> Array:
    """The logit lens' log-probability of targets [B, T] at each position of tokens [B, T], in nats: [L, B, T]."""

    def read(logits: Array) -> Array:
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    return logit_lens(network, params, tokens, site=site, read=read)
