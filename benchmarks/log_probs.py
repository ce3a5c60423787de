"""What do sequence log-probabilities and their gradient cost with the full [B, T, V] logits, and chunk by chunk?

Value and gradient at the head of SmolLM2-135M (D = 576, V = 49,152) with respect to hidden states and unembedding, or
to hidden states alone where the head is frozen, as under LoRA. Tokens and mask are data, unknown when compiling.
FLOPs count the products that the full form needs, also where a mask lets the chunked form skip some and where it
computes some twice.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Measurement, measure
from jaxalign.preferences import chunked_sequence_log_probs, sequence_log_probs


def cases(quick: bool) -> list[dict[str, Any]]:
    """Full and chunked, with every token a completion token and with the first half prompt."""
    shape = {"B": 2, "T": 16, "D": 32, "V": 512} if quick else {"B": 4, "T": 128, "D": 576, "V": 49152}
    chunks = (None, 8) if quick else (None, 32, 128, 256)
    half = shape["T"] // 2
    settings = [(prompt, "trained", chunk) for prompt in (0, half) for chunk in chunks]
    settings += [(half, "frozen", chunk) for chunk in (None, chunks[-2] or chunks[-1])]
    return [
        {
            "name": f"prompt {prompt}, {head} head, {'full logits' if chunk is None else f'chunks of {chunk}'}",
            **shape,
            "prompt": prompt,
            "head": head,
            "chunk_size": chunk,
            "dtype": "float32",
            "repeats": 3 if quick else 5,
        }
        for prompt, head, chunk in settings
    ]


def run(case: dict[str, Any]) -> Measurement:
    """Tokens per second of value and gradient; the sum of log-probs and the gradient norms as quality."""
    b, t, d, v = (case[name] for name in "BTDV")
    hidden_key, head_key, token_key = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(hidden_key, (b, t, d), case["dtype"])
    unembedding = jax.random.normal(head_key, (v, d), case["dtype"]) / d**0.5
    tokens = jax.random.randint(token_key, (b, t), 0, v)
    mask = jnp.broadcast_to(jnp.arange(t)[None, :] >= case["prompt"], (b, t)).astype(jnp.float32)

    def total(hidden: Any, unembedding: Any, tokens: Any, mask: Any) -> Any:
        if case["chunk_size"] is None:
            # One [B T, D] product, as fast as a backend multiplies: the full form at its best.
            logits = (hidden.reshape(b * t, d) @ unembedding.T).reshape(b, t, v)
            return jnp.sum(sequence_log_probs(logits, tokens, mask))
        return jnp.sum(chunked_sequence_log_probs(hidden, unembedding, tokens, mask, chunk_size=case["chunk_size"]))

    def quality(output: Any) -> dict[str, float]:
        value, gradients = output
        norms = {f"{name}_gradient_norm": float(jnp.linalg.norm(g)) for name, g in zip(names, gradients, strict=True)}
        return {"sum_log_probs": float(value), **norms}

    names = ("hidden", "unembedding") if case["head"] == "trained" else ("hidden",)
    return measure(
        jax.value_and_grad(total, argnums=tuple(range(len(names)))),
        hidden,
        unembedding,
        tokens,
        mask,
        unit="tokens",
        amount=b * t,
        flops=2.0 * (1 + len(names)) * b * t * d * v,
        dtype=case["dtype"],
        repeats=case["repeats"],
        quality=quality,
    )
