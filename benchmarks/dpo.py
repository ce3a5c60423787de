"""How many tokens a second does a DPO step take in, and in how much memory, against TRL on the same model and shapes?

A SmolLM2-135M-shaped Llama with random weights, pairs of equal length whose first half is prompt, AdamW, reference
log-probabilities precomputed on both sides. The peer is TRL's own DPOTrainer step with TRL's fastest setting (no
gradient checkpointing); ours is run with every activation kept and with layers recomputed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Measurement, measure
from jaxalign.networks import TransformerConfig, is_adapter, transformer
from jaxalign.preferences import PreferenceBatch, dpo, pair_log_probs

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cases(quick: bool) -> list[dict[str, Any]]:
    """Full fine-tuning and LoRA, kept and recomputed activations."""
    model, batch, length = (TINY, 2, 32) if quick else (SMOLLM2, 4, 128)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model["vocab_size"], (3, batch, length // 2)).tolist()
    shared = {
        "model": model, "prompt_ids": ids[0], "chosen_ids": ids[1], "rejected_ids": ids[2], "batch": batch,
        "warmup": 1, "steps": 3, "beta": 0.1, "learning_rate": 1e-5, "dtype": "float32", "seed": 0,
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
    network = transformer(config)
    prompt, chosen, rejected = (jnp.asarray(case[f"{n}_ids"], jnp.int32) for n in ("prompt", "chosen", "rejected"))
    mask = jnp.concatenate([jnp.zeros_like(prompt), jnp.ones_like(chosen)], axis=1) != 0
    batch = PreferenceBatch(
        jnp.concatenate([prompt, chosen], axis=1), mask, jnp.concatenate([prompt, rejected], axis=1), mask
    )
    algorithm = dpo(
        network,
        optax.adamw(case["learning_rate"], weight_decay=0.0),
        beta=case["beta"],
        reference="batch",
        trainable=is_adapter if rank else None,
    )
    state = jax.jit(algorithm.init)(jax.random.key(case["seed"]))
    scored = jax.jit(lambda params: pair_log_probs(network, params, batch))(state.all_params)
    batch = batch._replace(reference_chosen_logps=scored.chosen, reference_rejected_logps=scored.rejected)
    frozen, state = state.frozen, state.replace(frozen=None)

    def step(state: Any, frozen: Any, batch: PreferenceBatch) -> Any:
        new, metrics = algorithm.step(state.replace(frozen=frozen), batch)
        return new.replace(frozen=None), metrics

    tokens = 2 * batch.chosen_tokens.size
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
        flops=step_flops(sizes, tokens, int(2 * mask.sum()), lora=bool(rank)),
        dtype=case["dtype"],
        donate=(0,),
        advance=lambda args, out: (out[0], *args[1:]),
        quality=lambda out: {"loss": float(out[1]["loss"])},
    )


def config_of(sizes: dict[str, Any], **options: Any) -> TransformerConfig:
    """Our configuration of what transformers' LlamaConfig calls these sizes."""
    return TransformerConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"], num_layers=sizes["num_hidden_layers"],
        intermediate_size=sizes["intermediate_size"], num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"], head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        rope_theta=sizes["rope_theta"], rms_norm_epsilon=sizes["rms_norm_eps"], **options,
    )  # fmt: skip


def step_flops(sizes: dict[str, Any], tokens: int, scored: int, *, lora: bool) -> float:
    """Products of one step without recomputation: 2 per weight and token forward, 2 for inputs, 2 for weights.

    Frozen weights have no weight gradient; the head works on the `scored` tokens alone; attention scores, norms and
    the adapters themselves are left out (a few percent at these lengths).
    """
    d, f = sizes["hidden_size"], sizes["intermediate_size"]
    kv = d * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    body = sizes["num_hidden_layers"] * (2 * d * d + 2 * d * kv + 3 * d * f)
    per_weight = 4.0 if lora else 6.0
    return per_weight * (body * tokens + sizes["vocab_size"] * d * scored)
