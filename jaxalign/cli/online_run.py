"""What `jaxalign grpo` and `jaxalign ppo-lm` do: prompts, reward, measure, train, measure again, report, export."""

import dataclasses
import functools
import hashlib
import json
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress

from jaxalign import Algorithm, Network
from jaxalign.algorithm import partition
from jaxalign.cli.grpo import Grpo
from jaxalign.cli.online_report import write_report
from jaxalign.cli.ppo_lm import PpoLm
from jaxalign.interop import Pretrained, load_pretrained, save_pretrained
from jaxalign.interop.prompt_data import PromptData, PromptRow, prompt_text, read_prompts
from jaxalign.interop.text_rewards import TextFunction, TextReward, each, load_reward_function
from jaxalign.interop.verifiable_tasks import TASKS
from jaxalign.networks import is_adapter
from jaxalign.rl import adaptive_kl
from jaxalign.rlhf import group_methods
from jaxalign.rlhf.generation import Completions, generate
from jaxalign.rlhf.language_ppo import ppo_lm
from jaxalign.rlhf.language_rollout import Prompts
from jaxalign.rlhf.verifiable_rewards import number_reward
from jaxalign.runtime import NonFiniteError, fit
from jaxalign.runtime.checkpoint import digests

METHODS = {
    "grpo": group_methods.grpo,
    "rloo": group_methods.rloo,
    "dr-grpo": group_methods.dr_grpo,
    "dapo": group_methods.dapo,
}
WARM_UP = 5


class Job(NamedTuple):
    """What pays for which prompts.

    rows, texts: N prompts, and what the model is shown of each
    network: the reward network
    words: the reward on text, or None if a reward model pays
    about: what is paid for
    digest: of prompts and reward
    """

    rows: list[PromptRow]
    texts: list[str]
    network: Network
    words: TextReward | None
    about: str
    digest: str


class Answers(NamedTuple):
    """Completions of the held-out prompts: texts [N], scores [N], lengths in tokens [N], ended [N]."""

    texts: list[str]
    scores: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray


def run(options: Grpo | PpoLm, console: Console) -> dict[str, Any]:
    """The whole job, in the order a reader would tell it; returns what was measured on the held-out prompts."""
    _check(options)
    console.print(f"Loading {options.model} ...")
    rank = options.lora_rank if options.lora else 0
    sizes: dict[str, Any] = {"dtype": options.dtype, "lora_rank": rank, "lora_alpha": 2.0 * rank}
    pretrained = load_pretrained(options.model, param_dtype=options.dtype if rank else "float32", **sizes)
    if pretrained.tokenizer is None:
        raise ValueError("the model's folder has no tokenizer.json, without which text cannot be read")
    job = job_of(options, pretrained)
    console.print(f"{len(job.rows)} prompts. Reward: {job.about}")
    held_out, train = (_prompts(options, pretrained, job, part) for part in (True, False))
    if (longest := train.width + options.max_new_tokens) > pretrained.config.max_length:
        raise ValueError(
            f"prompts of up to {train.width} tokens and {options.max_new_tokens} new ones are {longest}, more than the "
            f"model's context of {pretrained.config.max_length}"
        )
    before = answer(options, pretrained, job, held_out, pretrained.params, "Before", console)
    try:
        state, metrics = fit(
            algorithm_of(options, pretrained, job),
            jax.random.key(options.seed),
            train.batch,
            steps=options.steps,
            chunk=1,
            directory=options.out,
            resume=options.resume,
            checkpoint_every=options.checkpoint_every,
            fingerprint=_fingerprint(options, pretrained, job),
            progress=console,
        )
    except NonFiniteError as error:
        if job.words is None or job.words.failure is None:
            raise
        raise ValueError(f"the reward failed at step {error.step}: {job.words.failure} ({error})") from error
    policy = state.all_params["policy"]
    after = answer(options, pretrained, job, held_out, policy, "After", console)
    prompts = [_question(row) for row in job.rows[: len(held_out)]]
    report, results = write_report(options, job.about, metrics, prompts, before, after)
    report.print(console)
    if options.export:
        folder = options.out / "model"
        if folder.exists():
            shutil.rmtree(folder)
        save_pretrained(folder, pretrained._replace(params=policy))
        console.print(f"The tuned model is in {folder}: jaxalign generate --model {folder}")
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def job_of(options: Grpo | PpoLm, pretrained: Pretrained) -> Job:
    """The prompts the options name, and what pays for them."""
    if options.data is not None:
        rows, about = read_prompts(options.data), "the number in `answer`, 1 if the completion's last number is it"
        function: TextFunction | None = None
        if all(isinstance(row.fields.get("answer"), int | float) for row in rows):
            function = each(lambda text, answer, **fields: number_reward(text, answer))
    else:
        rows, function, about = TASKS[options.task]()
    if options.reward is not None:
        function, about = load_reward_function(options.reward), f"the function {options.reward}"
    texts = [prompt_text(row, pretrained.tokenizer, chat=not options.plain) for row in rows]  # type: ignore[arg-type]
    words = None if function is None else TextReward(function, pretrained.tokenizer, rows)
    network = None if words is None else words.network
    if options.reward_model is not None:
        network, words, about = _reward_model(options, pretrained), None, f"the reward model {options.reward_model}"
    if network is None:
        raise ValueError(f"{options.data} has no number in `answer` in every row: give --reward or --reward-model")
    source = json.dumps([texts, about]).encode()
    if options.reward is not None:
        source += _source(options.reward)
    return Job(rows, texts, network, words, about, hashlib.sha256(source).hexdigest()[:16])


def _source(place: str) -> bytes:
    """The text of the file in FILE.py:NAME, which a resumed run must not have changed."""
    with open(place.rpartition(":")[0] if ".py:" in place else place, "rb") as file:
        return file.read()


def _question(row: PromptRow) -> str:
    """What a reader wants to see of a prompt: its text, or its last message."""
    return row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1]["content"])


def _reward_model(options: Grpo | PpoLm, pretrained: Pretrained) -> Network:
    from jaxalign.interop.reward_models import load_reward_model

    assert options.reward_model is not None
    reward = load_reward_model(options.reward_model)
    mine, other = pretrained.config.vocab_size, reward.config.vocab_size
    if mine != other:
        raise ValueError(f"{options.reward_model} reads a vocabulary of {other} tokens, {options.model} writes {mine}")
    return Network(
        lambda key: reward.params,
        lambda params, prompts, completions: reward.network.apply(params, completions.tokens, completions.mask),
    )


def _prompts(options: Grpo | PpoLm, pretrained: Pretrained, job: Job, held_out: bool) -> PromptData:
    """The first `held_out` prompts, or the others; `Prompts.index` counts the job's rows."""
    count = min(options.held_out, len(job.texts) // 2)
    chosen = slice(0, count) if held_out else slice(count, None)
    tokenizer: Any = pretrained.tokenizer
    return PromptData(
        job.texts[chosen], tokenizer, first=0 if held_out else count,
        batch_size=min(options.prompts, count) if held_out else options.prompts, seed=options.seed,
        pad_id=tokenizer.pad_id or 0, max_length=options.max_prompt_length,
    )  # fmt: skip


def algorithm_of(options: Grpo | PpoLm, pretrained: Pretrained, job: Job) -> Algorithm:
    """The Algorithm the options ask for, starting from the pretrained weights."""
    peak = options.learning_rate if options.learning_rate is not None else (2e-4 if options.lora else 2e-6)
    schedule = optax.linear_schedule(peak / WARM_UP, peak, WARM_UP)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    rows = options.prompts * options.samples // options.minibatches
    shared: dict[str, Any] = {
        "samples": options.samples,
        "clip_epsilon": options.clip,
        "num_epochs": options.epochs,
        "num_minibatches": options.minibatches,
        "microbatches": rows // min(options.microbatch, rows),
        "trainable": is_adapter if options.lora else None,
        **_generation(options, pretrained),
    }
    base, _ = partition(pretrained.params, lambda name: not is_adapter(name))
    model: Any = pretrained.network.starting_from(base)  # the seed draws the adapters
    if isinstance(options, Grpo):
        return METHODS[options.method](model, optimizer, job.network, kl_coefficient=options.kl, **shared)
    controller = None
    if options.kl_target is not None:
        controller = adaptive_kl(initial=options.kl, target=options.kl_target, horizon=options.kl_horizon)
    return ppo_lm(
        model, optimizer, job.network, kl_coefficient=options.kl, kl_controller=controller,
        missing_stop_penalty=options.missing_stop_penalty, gae_lambda=options.gae_lambda,
        value_coefficient=options.value_coefficient, whiten_rewards=options.whiten_rewards, **shared,
    )  # fmt: skip


def _generation(options: Grpo | PpoLm, pretrained: Pretrained) -> dict[str, Any]:
    tokenizer: Any = pretrained.tokenizer
    stops = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return {
        "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "stop_ids": stops,
        "pad_id": tokenizer.pad_id or 0,
    }  # fmt: skip


def answer(
    options: Grpo | PpoLm, pretrained: Pretrained, job: Job, data: PromptData, params: Any, title: str, console: Console
) -> Answers:
    """One completion of each held-out prompt, drawn with the same keys before and after, and what it is paid."""
    tokenizer: Any = pretrained.tokenizer
    draw = jax.jit(functools.partial(generate, model=pretrained.network, **_generation(options, pretrained)))
    pay = jax.jit(job.network.apply)
    reward_params = job.network.init(jax.random.key(0))
    reader = job.words or TextReward(each(lambda text, **fields: 0.0), tokenizer, job.rows)
    texts: list[str] = []
    scores, lengths, ended = [], [], []
    starts = range(0, len(data), data.batch_size)
    if not console.is_terminal:
        console.print(f"{title}: completing {len(data)} held-out prompts ...")
    with Progress(console=console, transient=True) as bar:
        for start in bar.track(starts, description=f"{title}: held-out prompts"):
            numbers = np.arange(start, start + data.batch_size)
            prompts: Prompts = data.rows(np.minimum(numbers, len(data) - 1))
            key = jax.random.fold_in(jax.random.key(options.seed), start)
            completions: Completions = draw(key, params=params, prompts=prompts.tokens, prompt_lengths=prompts.lengths)
            kept = numbers < len(data)
            said = reader.texts(completions.tokens, completions.mask)
            if job.words is None:
                paid = np.asarray(pay(reward_params, prompts, completions))
            else:  # a failure is raised here, before anything was trained
                paid = job.words.scores(prompts.index, said, completions.ended)
            texts += [text for text, keep in zip(said, kept, strict=True) if keep]
            scores.append(paid[kept])
            lengths.append(np.asarray(completions.mask).sum(axis=1)[kept])
            ended.append(np.asarray(completions.ended)[kept])
    return Answers(texts, *(np.concatenate(x) for x in (scores, lengths, ended)))


def _check(options: Grpo | PpoLm) -> None:
    if not options.resume and (options.out / "checkpoints").exists():
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    for name in (
        "steps", "prompts", "samples", "max_new_tokens", "max_prompt_length", "temperature", "lora_rank", "epochs",
        "minibatches", "microbatch", "held_out", "checkpoint_every",
    ):  # fmt: skip
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if isinstance(options, Grpo) and options.samples < 2:
        raise ValueError("--samples must be at least 2: completions of a prompt are compared with each other")
    rows = options.prompts * options.samples
    part = min(options.microbatch, rows // options.minibatches)
    if rows % options.minibatches or (rows // options.minibatches) % part:
        raise ValueError(
            f"{rows} completions (--prompts {options.prompts} x --samples {options.samples}) do not split into "
            f"--minibatches {options.minibatches} of a multiple of --microbatch {options.microbatch}"
        )
    if options.reward is not None and options.reward_model is not None:
        raise ValueError("give --reward or --reward-model, not both")


def _fingerprint(options: Grpo | PpoLm, pretrained: Pretrained, job: Job) -> dict[str, Any]:
    """What must be the same when a run is resumed: every option that changes the numbers, the prompts, the weights."""
    free = {"out", "resume", "steps", "checkpoint_every", "export", "data", "model", "reward", "reward_model"}
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if name not in free}
    weights = hashlib.sha256(np.asarray(jax.device_get(digests(pretrained.params))).tobytes()).hexdigest()[:16]
    return {**fixed, "job": type(options).__name__, "prompts_and_reward": job.digest, "model": weights}
