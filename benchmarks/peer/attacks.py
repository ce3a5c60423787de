"""The peers of the attacks benchmark, foolbox or torchattacks: one JSON case on stdin, one JSON object on stdout."""

import contextlib
import importlib.metadata
import json
import sys
import time

import numpy as np
import torch

from benchmarks.attacks_problem import KERNEL, SIDE, read, success_rate
from benchmarks.environment import process_peak_bytes


def classifier(case, problem):
    """The benchmark's network with the problem's weights, of images [B, 1, 28, 28]."""
    weights = {name: torch.from_numpy(value) for name, value in problem.weights.items()}
    if case["network"] == "mlp":
        return torch.nn.Sequential(torch.nn.Flatten(), *dense(weights, ""))
    layers, channels, side = [], 1, SIDE
    for i in range(sum(name.startswith("Conv_") for name in weights) // 2):
        kernel, bias = weights[f"Conv_{i}/kernel"], weights[f"Conv_{i}/bias"]
        conv = torch.nn.Conv2d(channels, len(bias), KERNEL, stride=2, padding=(KERNEL - 1) // 2)
        conv.weight.data, conv.bias.data = kernel.permute(3, 2, 0, 1).contiguous(), bias
        layers += [conv, torch.nn.ReLU()]
        channels, side = len(bias), side // 2
    # Flax flattens [H, W, C], torch [C, H, W].
    first = weights["MLP_0/Dense_0/kernel"]
    reordered = first.reshape(side, side, channels, -1).permute(2, 0, 1, 3).reshape(first.shape)
    weights["MLP_0/Dense_0/kernel"] = reordered
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), *dense(weights, "MLP_0/"))


def dense(weights, prefix):
    """The dense layers, a ReLU between two."""
    layers = []
    for i in range(sum(name.startswith(f"{prefix}Dense_") for name in weights) // 2):
        kernel, bias = weights[f"{prefix}Dense_{i}/kernel"], weights[f"{prefix}Dense_{i}/bias"]
        layer = torch.nn.Linear(*kernel.shape)
        layer.weight.data, layer.bias.data = kernel.T.contiguous(), bias
        layers += [torch.nn.ReLU(), layer] if layers else [layer]
    return layers


def foolbox_pgd(case, model, steps, size):
    """foolbox's projected gradient descent with the same number and size of steps, from a random start."""
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=size, random_start=True)
    return lambda x, y: attack(wrapped, x, y, epsilons=case["epsilon"])[1]


def torchattacks_pgd(case, model, steps, size):
    """The same of torchattacks."""
    import torchattacks

    return torchattacks.PGD(model, eps=case["epsilon"], alpha=size, steps=steps, random_start=True)


def torchattacks_auto_attack(case, model):
    """torchattacks' own list of the standard version, with the steps and queries of the case."""
    import torchattacks

    attack = torchattacks.AutoAttack(model, eps=case["epsilon"], version="standard", n_classes=10)
    for part in attack._autoattack.attacks:
        if hasattr(part, "n_queries"):
            part.n_queries = case["queries"]
        else:
            part.steps = case["steps"]
    return attack


def run(case):
    """The record: seconds of each attack on all images, and the share of them misclassified in the end."""
    torch.manual_seed(case["seed"])
    problem = read(case)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = classifier(case, problem).to(device).eval()
    x = torch.from_numpy(problem.x)[:, None].to(device)
    y = torch.from_numpy(problem.y).long().to(device)
    if case["attack"] == "auto_attack":
        attack = torchattacks_auto_attack(case, model)
    else:
        build = foolbox_pgd if case["peer"] == "foolbox" else torchattacks_pgd
        attack = build(case, model, 40, case["epsilon"] / 30)

    def attacked(x, y):
        found = attack(x, y)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    def quality(x_adv):
        inside = (x_adv - x).abs().max().item() <= case["epsilon"] + 1e-6
        assert inside, "an adversarial image is outside the ball"
        with torch.no_grad():
            return {"success": success_rate(np.asarray(model(x_adv).argmax(1).cpu()), problem)}

    warmup = 0 if case["attack"] == "auto_attack" else 1
    wall, cpu = [], []
    for _ in range(1 + warmup + case["repeats"]):
        began = time.perf_counter(), time.process_time()
        found = attacked(x, y)
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return {
        "unit": "images",
        "amount": float(len(x)),
        "first": wall[0],
        "samples": wall[1 + warmup :],
        "cpu_samples": cpu[1 + warmup :],
        "arithmetic": "float32",
        "quality": quality(found),
        "details": {"threads": torch.get_num_threads()},
        "side": f"{case['peer']} {importlib.metadata.version(case['peer'])}",
        "process_peak_bytes": process_peak_bytes(),
        "environment": {
            "device_kind": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in (case["peer"], "torch", "numpy")},
        },
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = run(json.load(sys.stdin))
    print(json.dumps(answer))
