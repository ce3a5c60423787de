"""How many tokens a second does a reward-model step take in, and in how much memory, against TRL's RewardTrainer?

The SmolLM2-135M-shaped Llama and the pairs of equal length of the dpo benchmark, random weights, a scalar head in place
of the vocabulary, AdamW. The peer is TRL's own step with TRL's fastest setting (no gradient checkpointing); ours is run
with every activation kept and with layers recomputed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.dpo import SMOLLM2, TARGETS, TINY, config_of, step_flops
from benchmarks.measure import Measurement, measure
from jaxalign.networks import transformer
from jaxalign.preferences.comparisons import Comparisons
from jaxalign.preferences.reward_model import reward_model
from jaxalign.preferences.reward_networks import is_adapter_or_head, language_reward


def cases(quick: bool) -> list[dict[str, Any]]:
    """Full fine-tuning and LoRA, kept and recomputed activations."""
    model, batch, length = (TINY, 2, 32) if quick else (SMOLLM2, 4, 128)
    rng = np.random.default_rng(0)
    # Token 0 pads the peer's rows, and it reads the reward at the last token that is not padding.
    ids = rng.integers(1, model["vocab_size"], (2, batch, length))
    ids[1, :, : length // 2] = ids[0, :, : length // 2]
    shared = {
        "model": model, "chosen_ids": ids[0].tolist(), "rejected_ids": ids[1].tolist(), "batch": batch,
        "warmup": 1, "steps": 3, "centering": 0.01, "learning_rate": 1e-5, "dtype": "float32", "seed": 0,
        "lora_rank": 16, "lora_alpha": 32, "lora_targets": TARGETS,
    }  # fmt: skip
    return [
        {"name": f"{tuning}, {batch} pairs of {length}, remat {remat}", "tuning": tuning, "remat": remat, **shared}
        for tuning in ("full", "lora")
        for remat in ("none", "full")
    ]


def run(case: dict[str, Any]) -> Measurement:
    """Tokens (both sides, prompts included) per second of one optimiser step; the loss reached as quality."""
    sizes = case["model"]
    rank = case["lora_rank"] if case["tuning"] == "lora" else 0
    config = config_of(
        sizes, dtype=case["dtype"], lora_rank=rank, lora_alpha=float(case["lora_alpha"]), remat=case["remat"]
    )
    chosen, rejected = (jnp.asarray(case[f"{name}_ids"], jnp.int32) for name in ("chosen", "rejected"))
    mask = jnp.broadcast_to(jnp.arange(chosen.shape[1])[None, :] >= chosen.shape[1] // 2, chosen.shape)
    batch = Comparisons(chosen, mask, rejected, mask)
    algorithm = reward_model(
        language_reward(transformer(config)),
        optax.adamw(case["learning_rate"], weight_decay=0.0),
        centering=case["centering"],
        trainable=is_adapter_or_head if rank else None,
    )
    state = jax.jit(algorithm.init)(jax.random.key(case["seed"]))
    frozen, state = state.frozen, state.replace(frozen=None)

    def step(state: Any, frozen: Any, batch: Comparisons) -> Any:
        new, metrics = algorithm.step(state.replace(frozen=frozen), batch)
        return new.replace(frozen=None), metrics

    tokens = 2 * chosen.size
    return measure(
        step,
        state,
        frozen,
        batch,
        unit="tokens",
        amount=tokens,
        warmup=case["warmup"],
        repeats=case["steps"],
        budget=600.0,
        flops=step_flops(sizes, tokens, 0, lora=bool(rank)),
        dtype=case["dtype"],
        donate=(0,),
        advance=lambda args, out: (out[0], *args[1:]),
        quality=lambda out: {"loss": float(out[1]["loss"])},
    )
