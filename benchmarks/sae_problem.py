"""What both sides of the sae benchmark train on, by NumPy alone: sparse sums of fixed directions, with noise.

Nothing of JAX in here: the peer makes the same batches.
"""

from typing import Any

import numpy as np

BATCH, LEARNING_RATE, CLIP = 1024, 1e-3, 1.0
STORED = 16  # batches in memory, gone through again and again


def batches(case: dict[str, Any]) -> np.ndarray:
    """[STORED, BATCH, d] float32: each row the sum of about k of F unit vectors with amounts in [0.5, 1.5]."""
    random = np.random.default_rng(0)
    d, features, k = case["d_in"], case["d_sae"], case["k"]
    directions = random.standard_normal((features, d)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = STORED * BATCH
    x = 0.01 * random.standard_normal((rows, d)).astype(np.float32)
    for _ in range(k):
        amount = random.uniform(0.5, 1.5, (rows, 1)).astype(np.float32)
        x += amount * directions[random.integers(0, features, rows)]
    return x.reshape(STORED, BATCH, d)


def step_flops(case: dict[str, Any]) -> float:
    """Operations of the five matrix products of a dense step: encode, decode, and three for gradients."""
    return 5 * 2.0 * BATCH * case["d_in"] * case["d_sae"]


def matmul_shapes(case: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The encoder's product, whose rate stands for the peak."""
    return (BATCH, case["d_in"]), (case["d_in"], case["d_sae"])
