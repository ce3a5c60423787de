"""The peer of the certify benchmark, auto_LiRPA: one JSON case on stdin, one JSON object on stdout."""

import contextlib
import importlib.metadata
import json
import statistics
import sys
import time

import torch
from attacks import classifier  # the attacks peer beside this file
from auto_lirpa_today import import_auto_lirpa, margin_bounds

from benchmarks.certify_problem import NETWORKS, quality, read, specification
from benchmarks.environment import process_peak_bytes

NAMES = {"interval": "IBP", "crown": "CROWN", "training": "IBP"}
LEARNING_RATE = 1e-3


def timed(function, repeats):
    """(seconds, processor seconds) of each call, and what the last one gave."""
    wall, cpu = [], []
    for _ in range(repeats):
        began = time.perf_counter(), time.process_time()
        found = function()
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return wall, cpu, found


def bounded(model, x, y, case, conv_mode):
    """`() -> margin bounds [B, C-1]`, with a gradient where torch is asked for one."""
    module = import_auto_lirpa().BoundedModule(model, x[:1], bound_opts={"conv_mode": conv_mode})
    lower, upper = ((x + sign * case["epsilon"]).clamp(0, 1) for sign in (-1, 1))
    rows = torch.from_numpy(specification(y.numpy()))
    method = NAMES[case["method"]]
    return module, lambda: margin_bounds(module, x, rows, lower=lower, upper=upper, method=method)


def certify(case, model, x, y):
    """Bounds by the quicker of the ways to hold a convolution."""
    ways = ("patches", "matrix") if NETWORKS[case["network"]].channels and case["method"] == "crown" else ("patches",)
    found = {}
    for way in ways:
        _, bounds = bounded(model, x, y, case, way)
        with torch.no_grad():
            found[way] = timed(bounds, 2 + case["repeats"])
    best = min(found, key=lambda way: statistics.median(found[way][0][2:]))
    wall, cpu, bounds = found[best]
    medians = {way: statistics.median(one[0][2:]) for way, one in found.items()}
    return {
        "unit": "bounds",
        "amount": float(bounds.numel()),
        "first": wall[0],
        "samples": wall[2:],
        "cpu_samples": cpu[2:],
        "quality": quality(bounds.numpy()),
        "details": {"seconds by conv_mode": medians},
    }


def train(case, model, x, y):
    """A step on half the clean loss and half the loss at the interval bounds, and one on the clean loss alone."""
    module, bounds = bounded(model, x, y, case, "patches")
    optimizers = {"natural": model, "certified": module}
    optimizers = {name: torch.optim.Adam(of.parameters(), LEARNING_RATE) for name, of in optimizers.items()}

    def natural():
        optimizers["natural"].zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizers["natural"].step()

    def certified():
        optimizers["certified"].zero_grad()
        worst = torch.cat([torch.zeros(len(y), 1), -bounds()], dim=1)
        robust = torch.nn.functional.cross_entropy(worst, torch.zeros(len(y), dtype=torch.long))
        (0.5 * torch.nn.functional.cross_entropy(module(x), y) + 0.5 * robust).backward()
        optimizers["certified"].step()

    alone, _, _ = timed(natural, 3 + 5 * case["repeats"])
    wall, cpu, _ = timed(certified, 3 + 5 * case["repeats"])
    ratio = statistics.median(wall[3:]) / statistics.median(alone[3:])
    return {
        "unit": "steps",
        "amount": 1.0,
        "first": wall[0],
        "samples": wall[3:],
        "cpu_samples": cpu[3:],
        "quality": {"times a natural step": ratio},
        "details": {"natural step": statistics.median(alone[3:])},
    }


def run(case):
    """The record of one case."""
    torch.manual_seed(0)
    problem = read(case)
    kind = "conv" if NETWORKS[case["network"]].channels else "mlp"
    model = classifier({"network": kind}, problem).eval()
    x, y = torch.from_numpy(problem.x)[:, None], torch.from_numpy(problem.y).long()
    record = (train if case["method"] == "training" else certify)(case, model, x, y)
    record["details"]["threads"] = torch.get_num_threads()
    return {
        **record,
        "side": f"auto_LiRPA {importlib.metadata.version('auto_LiRPA')}",
        "arithmetic": "float32",
        "process_peak_bytes": process_peak_bytes(),
        "environment": {
            "device_kind": "cpu",
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in ("auto_LiRPA", "torch", "numpy")},
        },
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = run(json.load(sys.stdin))
    print(json.dumps(answer))
