"""The peer of the dpo benchmark: TRL's DPOTrainer on a Llama, one JSON case on stdin, one JSON object on stdout.

The case:
  model         {"folder": PATH} of a Hugging Face model, or the fields of a transformers LlamaConfig, whose weights are
                then drawn from `seed`: SmolLM2-135M is {"vocab_size": 49152, "hidden_size": 576, "intermediate_size":
                1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
                "tie_word_embeddings": true}
  prompt_ids, chosen_ids, rejected_ids
                lists of token ids, one per pair; pairs are taken in this order, `batch` to a step, and again from the
                start when they run out, so N batches give an N-step cycle
  batch         pairs in a step; one step is one AdamW update on all of them
  warmup, steps steps left out of the samples (the first is reported as "first"; at least 1), and steps timed
  beta, learning_rate                           constant schedule
  weight_decay, adam_beta1, adam_beta2, adam_epsilon, max_grad_norm (0: no clipping)
                optional; 0.0, 0.9, 0.999, 1e-8, 0
  tuning        "full" or "lora"; with "lora" also lora_rank, lora_alpha, lora_targets (["q_proj", "v_proj"], ...)
  dtype         optional, "float32" (default) or "bfloat16", of parameters and arithmetic
  matmul_precision
                optional, "highest" (default) or "high" (TF32 on NVIDIA GPUs, which is what XLA uses by default there)
  precompute_reference
                optional, true (default): reference log-probs once before the first step, by TRL's own option, and the
                time it takes is reported; false: at every step
  gradient_checkpointing
                optional, false (TRL's default is true, which is slower and smaller)
  max_length    optional, none: sequences are not cut
  device        optional, "cpu" to keep off an accelerator
  threads       optional, for torch's CPU operations
  seed          optional, 0

Every step is `DPOTrainer.train`'s own: its collator, loss, backward, clipping, AdamW and scheduler; rows come in order.
Tokens are counted as 2 * batch * length with the prompt in both halves, padding excluded.
"""

import contextlib
import json
import pathlib
import resource
import sys
import tempfile
import time

import peft
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.utils.data import SequentialSampler


def build_model(case):
    """The policy: read from a folder, or drawn at random from the configuration."""
    torch.manual_seed(case.get("seed", 0))
    dtype = getattr(torch, case.get("dtype", "float32"))
    if "folder" in case["model"]:
        return transformers.AutoModelForCausalLM.from_pretrained(case["model"]["folder"], dtype=dtype)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**case["model"]))
    return model.to(dtype)


def build_dataset(case):
    """`batch * (warmup + steps)` rows of ids, the given pairs over and over."""
    rows = case["batch"] * (case["warmup"] + case["steps"])
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = len(case["prompt_ids"])
    return Dataset.from_dict({name: [case[name][i % pairs] for i in range(rows)] for name in names})


def build_tokenizer():
    """TRL asks for a tokenizer to pad with; the rows are ids already, so it never sees a text."""
    bare = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<pad>")


def build_arguments(case, folder):
    """TRL's own defaults except for what the case states and what would write or report elsewhere."""
    return trl.DPOConfig(
        output_dir=folder,
        max_steps=case["warmup"] + case["steps"],
        per_device_train_batch_size=case["batch"],
        gradient_accumulation_steps=1,
        beta=case["beta"],
        learning_rate=case["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=case.get("weight_decay", 0.0),
        adam_beta1=case.get("adam_beta1", 0.9),
        adam_beta2=case.get("adam_beta2", 0.999),
        adam_epsilon=case.get("adam_epsilon", 1e-8),
        max_grad_norm=case.get("max_grad_norm", 0.0),
        precompute_ref_log_probs=case.get("precompute_reference", True),
        gradient_checkpointing=case.get("gradient_checkpointing", False),
        max_length=case.get("max_length"),
        use_cpu=case.get("device") == "cpu",
        bf16=False,
        seed=case.get("seed", 0),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class IdsTrainer(trl.DPOTrainer):
    """DPOTrainer over rows that are token ids already, in their order, keeping the loss of every step."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss]
        return loss


class StepClock(transformers.TrainerCallback):
    """Seconds from the collated batch to the updated parameters, device work included."""

    def __init__(self):
        self.seconds, self.cpu_seconds = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.cpu_began, self.began = time.process_time(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.cpu_seconds.append(time.process_time() - self.cpu_began)


def synchronize():
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def process_peak_bytes():
    """Peak resident memory of this process; Linux keeps it per program in VmHWM, `ru_maxrss` may be the starter's."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(case):
    """Train for warmup + steps and report what the benchmarks' Measurement holds."""
    if case["warmup"] < 1:
        raise ValueError("dpo peer: warmup must be at least 1, the first step is never a steady one")
    if "threads" in case:
        torch.set_num_threads(case["threads"])
    torch.set_float32_matmul_precision(case.get("matmul_precision", "highest"))
    adapters = None
    if case["tuning"] == "lora":
        rank, alpha, targets = case["lora_rank"], case["lora_alpha"], case["lora_targets"]
        adapters = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    elif case["tuning"] != "full":
        raise ValueError(f"dpo peer: tuning must be 'full' or 'lora', got {case['tuning']!r}")
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
    lengths = [
        2 * len(rows[i]["prompt_ids"]) + len(rows[i]["chosen_ids"]) + len(rows[i]["rejected_ids"])
        for i in range(case["batch"])
    ]
    on_gpu = trainer.accelerator.device.type == "cuda"
    parameters = list(trainer.model.parameters())
    arithmetic = case.get("dtype", "float32")
    if on_gpu and arithmetic == "float32" and case.get("matmul_precision", "highest") != "highest":
        arithmetic = "tensorfloat32"
    losses = [float(loss) for loss in trainer.losses]
    return {
        "side": f"trl {trl.__version__}",
        "unit": "tokens",
        "amount": sum(lengths),
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
