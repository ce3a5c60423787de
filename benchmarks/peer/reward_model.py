"""The peer of the reward_model benchmark: TRL's RewardTrainer on a Llama, JSON on stdin, one JSON object on stdout.

The case is that of the dpo peer without prompt_ids, beta and precompute_reference:
  chosen_ids, rejected_ids
                lists of token ids, prompt and answer, one per pair
  centering     TRL's center_rewards_coefficient; 0 for none
and model, batch, warmup, steps, learning_rate, the optimiser's options, tuning, dtype, matmul_precision,
gradient_checkpointing, device, threads and seed as there. With "lora" the head is trained too.

Every step is `RewardTrainer.train`'s own. Tokens are counted without padding.
"""

import contextlib
import json
import sys
import tempfile
import time

import peft
import torch
import transformers
import trl
from datasets import Dataset
from dpo import StepClock, build_tokenizer, process_peak_bytes, synchronize  # the dpo peer beside this file
from torch.utils.data import SequentialSampler

NAMES = ("chosen_ids", "rejected_ids")


class IdsTrainer(trl.RewardTrainer):
    """RewardTrainer that takes its rows in order and keeps the loss of every step."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss]
        return loss


def build_model(case):
    """A Llama with a scalar head: read from a folder, or drawn at random from the configuration."""
    torch.manual_seed(case.get("seed", 0))
    dtype = getattr(torch, case.get("dtype", "float32"))
    if "folder" in case["model"]:
        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(case["model"]["folder"], num_labels=1, dtype=dtype)
    config = transformers.LlamaConfig(**case["model"], num_labels=1, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config).to(dtype)


def build_dataset(case):
    """`batch * (warmup + steps)` rows of ids, the given pairs over and over."""
    rows, pairs = case["batch"] * (case["warmup"] + case["steps"]), len(case["chosen_ids"])
    return Dataset.from_dict({name: [case[name][i % pairs] for i in range(rows)] for name in NAMES})


def build_arguments(case, folder):
    """TRL's own defaults except for what the case states and what would write or report elsewhere."""
    return trl.RewardConfig(
        output_dir=folder,
        max_steps=case["warmup"] + case["steps"],
        per_device_train_batch_size=case["batch"],
        gradient_accumulation_steps=1,
        center_rewards_coefficient=case["centering"] or None,
        learning_rate=case["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=case.get("weight_decay", 0.0),
        adam_beta1=case.get("adam_beta1", 0.9),
        adam_beta2=case.get("adam_beta2", 0.999),
        adam_epsilon=case.get("adam_epsilon", 1e-8),
        max_grad_norm=case.get("max_grad_norm", 0.0),
        gradient_checkpointing=case.get("gradient_checkpointing", False),
        max_length=None,
        use_cpu=case.get("device") == "cpu",
        bf16=False,
        seed=case.get("seed", 0),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def run(case):
    """Train for warmup + steps and report what the benchmarks' Measurement holds."""
    if case["warmup"] < 1:
        raise ValueError("reward_model peer: warmup must be at least 1, the first step is never a steady one")
    if case["tuning"] not in ("full", "lora"):
        raise ValueError(f"reward_model peer: tuning must be 'full' or 'lora', got {case['tuning']!r}")
    if "threads" in case:
        torch.set_num_threads(case["threads"])
    torch.set_float32_matmul_precision(case.get("matmul_precision", "highest"))
    adapters = None
    if case["tuning"] == "lora":
        rank, alpha, targets = case["lora_rank"], case["lora_alpha"], case["lora_targets"]
        adapters = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=targets, task_type="SEQ_CLS", modules_to_save=["score"]
        )
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trainer = IdsTrainer(
            model=build_model(case),
            args=build_arguments(case, folder),
            train_dataset=build_dataset(case),
            processing_class=build_tokenizer(),
            peft_config=adapters,
            callbacks=[clock],
        )
        synchronize()
        setup = time.perf_counter() - began
        trainer.train()
    return describe(case, trainer, clock, setup)


def describe(case, trainer, clock, setup):
    """The record: samples in seconds per step, tokens per step, losses of every step, memory in bytes."""
    rows = trainer.train_dataset
    on_gpu = trainer.accelerator.device.type == "cuda"
    parameters = list(trainer.model.parameters())
    arithmetic = case.get("dtype", "float32")
    if on_gpu and arithmetic == "float32" and case.get("matmul_precision", "highest") != "highest":
        arithmetic = "tensorfloat32"
    losses = [float(loss) for loss in trainer.losses]
    return {
        "side": f"trl {trl.__version__}",
        "unit": "tokens",
        "amount": sum(len(rows[i][name]) for i in range(case["batch"]) for name in NAMES),
        "first": clock.seconds[0],
        "samples": clock.seconds[case["warmup"] :],
        "cpu_samples": clock.cpu_seconds[case["warmup"] :],
        "arithmetic": arithmetic,
        "process_peak_bytes": process_peak_bytes(),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "quality": {"loss": losses[-1], "losses": losses},
        "details": {
            "setup_seconds": setup,
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "threads": torch.get_num_threads(),
        },
        "environment": {
            "device_kind": torch.cuda.get_device_name() if on_gpu else "cpu",
            "python": sys.version.split()[0],
            **{module.__name__: module.__version__ for module in (torch, transformers, trl, peft)},
        },
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        record = run(json.load(sys.stdin))
    print(json.dumps(record))
