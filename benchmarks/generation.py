"""How many tokens a second does greedy decoding write, and in how much memory, against transformers' `generate`?

A SmolLM2-135M-shaped Llama with random weights, prompts of equal length, no stop token, so that both sides write as
many tokens. One run reads the prompts and writes; the rate counts the written tokens. The peer is `generate` with its
default dynamic cache, its fastest on a CPU (a static cache was slower), and scaled-dot-product attention.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.dpo import SMOLLM2, TINY, config_of
from benchmarks.measure import Measurement, measure
from jaxalign.networks import TransformerConfig, transformer
from jaxalign.rlhf.generation import greedy


def cases(quick: bool) -> list[dict[str, Any]]:
    """A batch, a single prompt, and the batch in bfloat16."""
    model, length, new = (TINY, 8, 8) if quick else (SMOLLM2, 64, 64)
    rng = np.random.default_rng(0)
    return [
        {
            "name": f"{batch} prompts of {length}, {new} new tokens, {dtype}",
            "model": model,
            "prompt_ids": rng.integers(0, model["vocab_size"], (batch, length)).tolist(),
            "new_tokens": new,
            "dtype": dtype,
            "warmup": 1,
            "steps": 3,
            "seed": 0,
        }
        for batch, dtype in ((8, "float32"), (1, "float32"), (8, "bfloat16"))
    ]


def run(case: dict[str, Any]) -> Measurement:
    """New tokens per second over one call that reads the prompts and writes."""
    sizes, new = case["model"], case["new_tokens"]
    config = config_of(sizes, dtype=case["dtype"])
    network, params = transformer(config), _draw(config, case["seed"])
    prompts = jnp.asarray(case["prompt_ids"], jnp.int32)
    batch, length = prompts.shape
    return measure(
        lambda params, prompts, lengths: greedy(network, params, prompts, lengths, max_new_tokens=new),
        params,
        prompts,
        jnp.full(batch, length, jnp.int32),
        unit="tokens",
        amount=batch * new,
        warmup=case["warmup"],
        repeats=case["steps"],
        budget=600.0,
        flops=generation_flops(sizes, batch, length, new),
        dtype=case["dtype"],
        quality=lambda out: {"new_tokens": int(out.mask.sum())},
    )


def _draw(config: TransformerConfig, seed: int) -> Any:
    """Parameters as `decode` reads them, one layer at a time: the peak memory is to be that of generating."""
    one = transformer(dataclasses.replace(config, num_layers=1))

    @jax.jit
    def draw(key: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(config.dtype), one.for_decoding(one.init(key)))

    layer = jax.jit(lambda key: draw(key)["layers"][0])
    keys = jax.random.split(jax.random.key(seed), config.num_layers)
    return {**draw(keys[0]), "layers": tuple(layer(key) for key in keys)}


def generation_flops(sizes: dict[str, Any], batch: int, length: int, new: int) -> float:
    """Products with weights: 2 per weight and token, the head for written tokens alone; attention is left out."""
    d, f = sizes["hidden_size"], sizes["intermediate_size"]
    kv = d * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    body = sizes["num_hidden_layers"] * (2 * d * d + 2 * d * kv + 3 * d * f)
    return 2.0 * batch * (body * (length + new - 1) + sizes["vocab_size"] * d * new)
