"""The peer of the generation benchmark: transformers' `generate`, one JSON case on stdin, one JSON object on stdout.

The case:
  model         {"folder": PATH} of a Hugging Face model, or the fields of a LlamaConfig, whose weights are then drawn
                from `seed`
  prompt_ids    lists of token ids, all of one length
  new_tokens    written after each prompt, greedily, no token stopping them
  warmup, steps runs left out of the samples (the first is reported as "first"; at least 1), and runs timed
  dtype         optional, "float32" (default) or "bfloat16"
  cache         optional, generate's `cache_implementation` ("static"); its default, a dynamic cache
  device        optional, "cpu" to keep off an accelerator
  threads       optional, for torch's CPU operations
  seed          optional, 0
"""

import contextlib
import json
import pathlib
import resource
import sys
import time

import torch
import transformers


def build_model(case):
    """Read from a folder, or drawn at random from the configuration."""
    torch.manual_seed(case.get("seed", 0))
    dtype = getattr(torch, case.get("dtype", "float32"))
    if "folder" in case["model"]:
        return transformers.AutoModelForCausalLM.from_pretrained(case["model"]["folder"], dtype=dtype).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**case["model"])).to(dtype).eval()


def process_peak_bytes():
    """Peak resident memory of this process; Linux keeps it per program in VmHWM, `ru_maxrss` may be the starter's."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(case):
    """Generate warmup + steps times and report what the benchmarks' Measurement holds."""
    if case["warmup"] < 1:
        raise ValueError("generation peer: warmup must be at least 1, the first run is never a steady one")
    if "threads" in case:
        torch.set_num_threads(case["threads"])
    device = "cuda" if torch.cuda.is_available() and case.get("device") != "cpu" else "cpu"
    model = build_model(case).to(device)
    prompts = torch.tensor(case["prompt_ids"], device=device)
    options = {"max_new_tokens": case["new_tokens"], "min_new_tokens": case["new_tokens"], "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    if "cache" in case:
        options["cache_implementation"] = case["cache"]
    wall, cpu = [], []
    for _ in range(case["warmup"] + case["steps"]):
        cpu_began, began = time.process_time(), time.perf_counter()
        out = model.generate(prompts, **options)
        if device == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    new = out[:, prompts.shape[1] :]
    return {
        "side": f"transformers {transformers.__version__}",
        "unit": "tokens",
        "amount": new.numel(),
        "first": wall[0],
        "samples": wall[case["warmup"] :],
        "cpu_samples": cpu[case["warmup"] :],
        "arithmetic": case.get("dtype", "float32"),
        "process_peak_bytes": process_peak_bytes(),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "quality": {"new_tokens": new.numel()},
        "details": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "attention": model.config._attn_implementation,
            "cache": case.get("cache", "dynamic"),
            "threads": torch.get_num_threads(),
        },
        "environment": {
            "device_kind": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "python": sys.version.split()[0],
            **{module.__name__: module.__version__ for module in (torch, transformers)},
        },
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        record = run(json.load(sys.stdin))
    print(json.dumps(record))
