"""What do sequence log-probabilities and their gradient cost with the full [B, T, V] logits, and chunk by chunk?

Value and gradient with respect to hidden states and unembedding, at the head of SmolLM2-135M (D = 576, V = 49,152).
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
    chunks = (None, 8) if quick else (None, 32, 64, 128, 256)
    return [
        {
            "name": f"prompt {prompt}, {'full logits' if chunk is None else f'chunks of {chunk}'}",
            **shape,
            "prompt": prompt,
            "chunk_size": chunk,
            "dtype": "float32",
            "repeats": 3 if quick else 6,
        }
        for prompt in (0, shape["T"] // 2)
        for chunk in chunks
    ]


def run(case: dict[str, Any]) -> Measurement:
    """Tokens per second of value and gradient; the sum of log-probs and the gradient norms as quality."""
    b, t, d, v = (case[name] for name in "BTDV")
    hidden_key, head_key, token_key = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(hidden_key, (b, t, d), case["dtype"])
    unembedding = jax.random.normal(head_key, (v, d), case["dtype"]) / d**0.5
    tokens = jax.random.randint(token_key, (b, t), 0, v)
    mask = jnp.broadcast_to(jnp.arange(t)[None, :] >= case["prompt"], (b, t)).astype(jnp.float32)

    def total(hidden: Any, unembedding: Any) -> Any:
        if case["chunk_size"] is None:
            # One [B T, D] product, as fast as a backend multiplies: the full form at its best.
            logits = (hidden.reshape(b * t, d) @ unembedding.T).reshape(b, t, v)
            return jnp.sum(sequence_log_probs(logits, tokens, mask))
        return jnp.sum(chunked_sequence_log_probs(hidden, unembedding, tokens, mask, chunk_size=case["chunk_size"]))

    def quality(output: Any) -> dict[str, float]:
        value, (hidden_gradient, head_gradient) = output
        return {
            "sum_log_probs": float(value),
            "hidden_gradient_norm": float(jnp.linalg.norm(hidden_gradient)),
            "unembedding_gradient_norm": float(jnp.linalg.norm(head_gradient)),
        }

    return measure(
        jax.value_and_grad(total, argnums=(0, 1)),
        hidden,
        unembedding,
        unit="tokens",
        amount=b * t,
        flops=6.0 * b * t * d * v,
        dtype=case["dtype"],
        repeats=case["repeats"],
        quality=quality,
    )
