"""The peer of the synth_sae benchmark: SAELens' own trainer, one JSON case on stdin, one JSON object on stdout.

The case is one of benchmarks/synth_sae.py. The SAE is judged after SAELens has saved it and loaded it again, as a user
would have it: what selects over a batch is a JumpReLU SAE by then.
"""

import contextlib
import importlib.metadata
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.synth_sae_problem import judge, order_of, read, summarise

NAMES = {"relu": "standard", "matryoshka": "matryoshka_batchtopk"}


def settings(case):
    """The case in SAELens' words; the auxiliary loss is on in its own way, at its own default."""
    if case["activation"] == "relu":
        return {"l1_coefficient": case["sparsity"], "l1_warm_up_steps": case["warm_up"]}
    if case["activation"] == "jumprelu":
        return {
            "l0_coefficient": case["sparsity"],
            "l0_warm_up_steps": case["warm_up"],
            "jumprelu_bandwidth": case["bandwidth"],
            "jumprelu_init_threshold": case["threshold"],
        }
    extra = {"matryoshka_widths": list(case["widths"])} if case["activation"] == "matryoshka" else {}
    return {"k": case["k"], "aux_loss_coefficient": case["aux_coefficient"], **extra}


def train(case, problem, seed):
    """(seconds, processor seconds, scores) of one run from start to end."""
    torch.manual_seed(seed)
    sae_class, config_class = get_sae_training_class(NAMES.get(case["activation"], case["activation"]))
    sae = sae_class(config_class(d_in=problem.x.shape[1], d_sae=case["d_sae"], **settings(case)))
    config = SAETrainerConfig(
        total_training_samples=case["steps"] * case["batch"],
        train_batch_size_samples=case["batch"],
        lr=case["learning_rate"],
        lr_end=case["learning_rate"],
        lr_decay_steps=case["decay"],
        dead_feature_window=case["dead_steps"],
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = torch.from_numpy(problem.batches)
    provider = (batches[index] for index in order_of(case, seed))
    cpu_began, began = time.process_time(), time.perf_counter()
    SAETrainer(cfg=config, sae=sae, data_provider=provider).fit()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        saved = SAE.load_from_disk(folder)
    with torch.no_grad():
        latents = saved.encode(torch.from_numpy(problem.x))
        x_hat = saved.decode(latents)
    return seconds, cpu_seconds, judge(latents.numpy(), x_hat.numpy(), saved.W_dec.detach().numpy(), problem)


def process_peak_bytes():
    """Peak resident memory of this process, or None where the system does not tell."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM:"))


def run(case):
    """The record: seconds per training run, and what the runs found."""
    torch.set_num_threads(case["threads"])
    problem = read(case)
    runs = [train(case, problem, seed) for seed in range(case["seeds"])]
    seconds, cpu_seconds, scores = zip(*runs, strict=True)
    return {
        "side": f"SAELens {importlib.metadata.version('sae-lens')}",
        "unit": "samples",
        "amount": float(case["steps"] * case["batch"]),
        "first": seconds[0],
        "samples": list(seconds[1:]),
        "cpu_samples": list(cpu_seconds[1:]),
        "arithmetic": "float32",
        "process_peak_bytes": process_peak_bytes(),
        "quality": summarise(list(scores)),
        "details": {"by seed": list(scores), "threads": torch.get_num_threads()},
        "environment": {
            "device_kind": "cpu",
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in ("sae-lens", "torch")},
            "numpy": np.__version__,
        },
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        record = run(json.load(sys.stdin))
    print(json.dumps(record))
