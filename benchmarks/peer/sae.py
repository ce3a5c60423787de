"""The peer of the sae benchmark, SAELens: one JSON case on stdin, one JSON object on stdout."""

import contextlib
import importlib.metadata
import itertools
import json
import statistics
import sys
import time

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.environment import process_peak_bytes
from benchmarks.sae_problem import BATCH, CLIP, LEARNING_RATE, batches, matmul_shapes, step_flops


def autoencoder(case):
    """SAELens' TopK autoencoder as its trainer takes it."""
    config = TopKTrainingSAEConfig(d_in=case["d_in"], d_sae=case["d_sae"], k=case["k"], aux_loss_coefficient=1.0)
    return TopKTrainingSAE(config)


def timed(function, warmup, repeats, budget=20.0):
    """(seconds, processor seconds) of each call, and what the last one gave."""
    wall, cpu = [], []
    for _ in range(1 + warmup + repeats):
        if len(wall) >= 4 + warmup and sum(wall[1 + warmup :]) > budget:
            break
        began = time.perf_counter(), time.process_time()
        found = function()
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return wall, cpu, found


def steps(case, data):
    """`() -> loss` after `steps` bare training steps."""
    sae = autoencoder(case)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)

    def run():
        for i in range(case["steps"]):
            given = TrainStepInput(
                sae_in=data[i % len(data)],
                coefficients={},
                dead_neuron_mask=None,
                n_training_steps=0,
                is_logging_step=False,
            )
            output = sae.training_forward_pass(given)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return output.losses["mse_loss"].item()

    return run


def trainer(case, data):
    """`() -> loss` after a run of SAELens' trainer from fresh weights."""

    def run():
        sae = autoencoder(case)
        config = SAETrainerConfig(
            total_training_samples=case["steps"] * BATCH,
            train_batch_size_samples=BATCH,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE,
        )
        SAETrainer(config, sae, itertools.cycle(data)).fit()
        with torch.no_grad():
            x = data[(case["steps"] - 1) % len(data)]
            return (sae(x) - x).pow(2).sum(dim=-1).mean().item()

    return run


def matmul_seconds(case):
    """The median of the encoder's product."""
    left, right = (torch.randn(shape) for shape in matmul_shapes(case))
    return statistics.median(timed(lambda: left @ right, 2, 17)[0][3:])


def run(case):
    """The record of one case."""
    torch.manual_seed(0)
    data = list(torch.from_numpy(batches(case)))
    train = (trainer if case["kind"] == "trainer" else steps)(case, data)
    wall, cpu, loss = timed(train, 1, case["repeats"])
    product = matmul_seconds(case)
    per_step = statistics.median(wall[2:]) / case["steps"]
    share = 5 * product / per_step
    return {
        "unit": "samples",
        "amount": float(case["steps"] * BATCH),
        "first": wall[0],
        "samples": wall[2:],
        "cpu_samples": cpu[2:],
        "flops": case["steps"] * step_flops(case),
        "quality": {"loss": loss},
        "details": {
            "encoder product, seconds": product,
            "share of its rate": share,
            "threads": torch.get_num_threads(),
        },
        "side": f"SAELens {importlib.metadata.version('sae-lens')}",
        "arithmetic": "float32",
        "process_peak_bytes": process_peak_bytes(),
        "environment": {
            "device_kind": "cpu",
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in ("sae-lens", "torch", "numpy")},
        },
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = run(json.load(sys.stdin))
    print(json.dumps(answer))
