"""Small tasks whose answers a program can check, for trying online learning on a real language model."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxalign.interop.prompt_data import PromptRow
from jaxalign.interop.text_rewards import TextFunction, each
from jaxalign.rlhf.verifiable_rewards import format_reward, length_reward, number_reward

SEED = 20261122
SUBJECTS = (
    "the sea, bread, bicycles, the moon, honey bees, rain, chess, tea, mountains, glass, owls, gardens, trains, "
    "paper, rivers, salt, clocks, maps, bridges, snow, whales, coffee, libraries, volcanoes, kites, apples, deserts, "
    "music, silk, lighthouses, ants, wool, stars, cheese, islands, pencils, foxes, windmills, rice, umbrellas, "
    "spiders, soap, forests, mirrors, horses, candles, cotton, tides, pianos, olives"
)
VERBS = ("Tell me about", "Explain", "Describe", "What do you know about", "Say something about")
SENTENCE_WORDS = 12


class VerifiableTask(NamedTuple):
    """Prompts and a reward in [0, 1] on the text of their completions.

    rows: N prompts, in random order
    reward: see `TextReward`
    about: what the reward is
    """

    rows: list[PromptRow]
    reward: TextFunction
    about: str


def arithmetic() -> VerifiableTask:
    """Sums of two numbers below 20; 1 if the last number of the answer is right, else 0."""
    rows = [
        (f"What is {a} + {b}? Answer with the number only.", {"answer": a + b}) for a in range(20) for b in range(20)
    ]
    return _task(rows, each(number_reward), "1 if the last number in the completion is the answer, else 0")


def length() -> VerifiableTask:
    """Questions on everyday things, to be answered in twelve words: the nearer the better, and cut off counts for 0."""
    questions = (f"{verb} {subject} in one short sentence." for verb in VERBS for subject in SUBJECTS.split(", "))
    rows = [(question, {"words": SENTENCE_WORDS}) for question in questions]
    about = f"min(n, {SENTENCE_WORDS}) / max(n, {SENTENCE_WORDS}) for n words that end by themselves, 0 if cut off"
    return _task(rows, each(_finished_length), about)


def _finished_length(text: str, words: int, ended: bool) -> float:
    # Without this a policy learns to write long words instead of stopping.
    return length_reward(text, words) if ended else 0.0


def bullets() -> VerifiableTask:
    """The same questions; 1 if the answer is a list of lines that begin with a dash, and nothing else."""
    pattern = r"- [^\n]+(\n- [^\n]+)+"
    questions = (f"{verb} {subject} in a few short points." for verb in VERBS for subject in SUBJECTS.split(", "))
    rows = [(question, {"pattern": pattern}) for question in questions]
    return _task(rows, each(format_reward), 'the whole completion is two or more lines, each beginning with "- "')


def _task(rows: list[tuple[str, dict]], reward: TextFunction, about: str) -> VerifiableTask:
    order = np.random.default_rng(SEED).permutation(len(rows))
    return VerifiableTask([PromptRow(*rows[i]) for i in order], reward, about)


TASKS: dict[str, Callable[[], VerifiableTask]] = {"arithmetic": arithmetic, "length": length, "bullets": bullets}
