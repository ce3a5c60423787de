"""A preference data set that needs no file: small tasks with answers that can be checked, made from a fixed seed."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxalign.interop.preference_files import PreferencePair

SEED = 20261121
CONSONANTS, VOWELS, ALPHABET = "bdfgklmnprstvz", "aeiou", "abcdefghijklmnopqrstuvwxyz"

OPPOSITES = (
    "hot cold, big small, fast slow, high low, old new, open shut, early late, light dark, rich poor, full empty, "
    "hard soft, wet dry, loud quiet, strong weak, up down, left right, near far, happy sad, clean dirty, thick thin, "
    "true false, inside outside, first last, deep shallow, sweet sour, win lose, push pull, buy sell, north south, "
    "east west, day night, summer winter, friend enemy, question answer, arrive leave, begin end"
)
CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, Egypt Cairo, Norway Oslo, Greece Athens, "
    "Austria Vienna, Poland Warsaw, Portugal Lisbon, Ireland Dublin, Cuba Havana, Peru Lima, Kenya Nairobi, "
    "Russia Moscow, China Beijing, Sweden Stockholm, Finland Helsinki, Hungary Budapest, Canada Ottawa, "
    "Turkey Ankara, Iran Tehran, Iraq Baghdad, Chile Santiago, Ghana Accra, Nepal Kathmandu, Vietnam Hanoi, "
    "Thailand Bangkok, Bulgaria Sofia, Romania Bucharest, Serbia Belgrade, Belgium Brussels, Denmark Copenhagen"
)


class Task(NamedTuple):
    """One kind of question.

    pattern: what its prompts look like, with the question's parts as groups
    answer: groups -> the right answer, computed from the prompt's text alone
    questions: Generator -> endless (prompt, wrong answer)
    train, held_out: how many pairs it gives to each part
    """

    pattern: str
    answer: Callable[..., str]
    questions: Callable[[np.random.Generator], Iterator[tuple[str, str]]]
    train: int
    held_out: int


def embedded_preferences() -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, held_out): the same pairs at every call, all text; no prompt is in both.

    Each answer starts with a space. The right and the wrong answers of a task have the same lengths and, as nearly as
    the task allows, the same distribution over characters, so that only reading the prompt tells them apart:
    "larger" and "smaller" ask about the same kind of numbers, "earlier" and "later" about the same letters, a wrong
    word has one letter of the right one replaced, and wrong facts are the right answers to other questions.
    """
    train: list[PreferencePair] = []
    held_out: list[PreferencePair] = []
    for name, task in TASKS.items():
        rng = np.random.default_rng((SEED, *name.encode()))
        questions = _distinct(task.questions(rng), task.train + task.held_out)
        pairs = [PreferencePair(prompt, f" {right_answer(prompt)}", f" {wrong}") for prompt, wrong in questions]
        held_out += pairs[: task.held_out]
        train += pairs[task.held_out :]
    rng = np.random.default_rng(SEED)
    return [train[i] for i in rng.permutation(len(train))], [held_out[i] for i in rng.permutation(len(held_out))]


def task_of(prompt: str) -> str:
    """The name in TASKS of the task a prompt belongs to. Raises ValueError if there is none."""
    return _recognised(prompt)[0]


def right_answer(prompt: str) -> str:
    """The right answer, worked out from the prompt's text. Raises ValueError if it is no prompt of this data set."""
    name, groups = _recognised(prompt)
    return TASKS[name].answer(*groups)


def verify(prompt: str, answer: str) -> bool:
    """Whether `answer` (white space around it aside) is right. Raises ValueError as `right_answer` does."""
    return answer.strip() == right_answer(prompt)


def _recognised(prompt: str) -> tuple[str, tuple[str, ...]]:
    for name, task in TASKS.items():
        if match := re.fullmatch(task.pattern, prompt):
            return name, match.groups()
    raise ValueError(f"{prompt!r} is not a prompt of the embedded preferences")


def _distinct(questions: Iterator[tuple[str, str]], count: int) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for prompt, wrong in itertools.islice(questions, 100 * count):
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, wrong
        if len(seen) == count:
            return
    raise ValueError(f"the task has only {len(seen)} of {count} prompts")


def _two_numbers(rng: np.random.Generator, *, word: str) -> Iterator[tuple[str, str]]:
    choose = {"larger": min, "smaller": max}[word]
    while True:
        a, b = (int(x) for x in rng.choice(np.arange(10, 100), 2, replace=False))
        yield f"{word} of {a} and {b}:", str(choose(a, b))


def _sums(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    while True:
        a, b, off = int(rng.integers(5, 50)), int(rng.integers(5, 50)), int(rng.choice([-10, -2, -1, 1, 2, 10]))
        if 10 <= a + b + off < 100 and 10 <= a + b < 100:
            yield f"{a} plus {b}:", str(a + b + off)


def _letter_runs(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """The wrong letter is another one near the last."""
    while True:
        length, last, step = int(rng.integers(2, 8)), int(rng.integers(1, 25)), int(rng.choice([-1, 1]))
        if 0 <= last - step * (length - 1) < 26:
            run = " ".join(ALPHABET[last - step * back] for back in range(length - 1, -1, -1))
            near = [x for x in range(max(0, last - 3), min(26, last + 4)) if x != last + step]
            yield f"go on {run}:", ALPHABET[int(rng.choice(near))]


def _words(rng: np.random.Generator, *, word: str) -> Iterator[tuple[str, str]]:
    """The wrong answer has one letter replaced by another of its kind."""
    while True:
        a, b, c = rng.choice(list(CONSONANTS)), rng.choice(list(VOWELS)), rng.choice(list(CONSONANTS))
        right = [a, b, c] if word == "copy" else [c, b, a]
        place = int(rng.integers(3))
        wrong = list(right)
        wrong[place] = rng.choice(list(VOWELS if place == 1 else CONSONANTS))
        if a != c and wrong != right:
            yield f"{word} {a}{b}{c}:", "".join(wrong)


def _two_letters(rng: np.random.Generator, *, word: str) -> Iterator[tuple[str, str]]:
    choose = {"earlier": max, "later": min}[word]
    while True:
        a, b = (str(x) for x in rng.choice(list(ALPHABET), 2, replace=False))
        yield f"{word} of {a} and {b}:", choose(a, b)


def _letter_counts(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    while True:
        right, wrong = rng.choice([1, 2, 3], 2, replace=False)
        letter = rng.choice(list(VOWELS))
        others = [x for x in ALPHABET if x != letter]
        letters = [letter] * int(right) + list(rng.choice(others, 6 - int(right)))
        yield f"count {letter} in {''.join(rng.permutation(letters))}:", str(wrong)


def _facts(rng: np.random.Generator, *, form: str, table: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Wrong answers are the right ones shifted round a circle of the questions, so both have one distribution."""
    keys = [str(key) for key in rng.permutation(list(table))]
    for key, other in zip(keys, keys[1:] + keys[:1], strict=True):
        yield form.format(key), table[other]


def _continue_run(run: str) -> str:
    before, last = ALPHABET.index(run[-3]), ALPHABET.index(run[-1])
    return ALPHABET[2 * last - before]


def _table(text: str) -> dict[str, str]:
    return dict(entry.split(" ") for entry in text.split(", "))  # type: ignore[misc]


_CAPITAL_OF = _table(CAPITALS)
_OPPOSITE_OF = _table(OPPOSITES) | {b: a for a, b in _table(OPPOSITES).items()}

TASKS = {
    "larger": Task(
        r"larger of (\d+) and (\d+):",
        lambda a, b: str(max(int(a), int(b))),
        functools.partial(_two_numbers, word="larger"),
        train=250,
        held_out=40,
    ),
    "smaller": Task(
        r"smaller of (\d+) and (\d+):",
        lambda a, b: str(min(int(a), int(b))),
        functools.partial(_two_numbers, word="smaller"),
        train=250,
        held_out=40,
    ),
    "letters": Task(r"go on ((?:[a-z] )+[a-z]):", _continue_run, _letter_runs, train=120, held_out=20),
    "earlier": Task(
        r"earlier of ([a-z]) and ([a-z]):", min, functools.partial(_two_letters, word="earlier"), train=250, held_out=40
    ),
    "later": Task(
        r"later of ([a-z]) and ([a-z]):", max, functools.partial(_two_letters, word="later"), train=250, held_out=40
    ),
    "copy": Task(
        r"copy ([a-z]+):", lambda word: word, functools.partial(_words, word="copy"), train=200, held_out=25
    ),
    "reverse": Task(
        r"reverse ([a-z]+):", lambda word: word[::-1], functools.partial(_words, word="reverse"), train=200, held_out=25
    ),
    "count": Task(
        r"count ([a-z]) in ([a-z]+):",
        lambda letter, word: str(word.count(letter)),
        _letter_counts,
        train=60,
        held_out=20,
    ),
    "sum": Task(r"(\d+) plus (\d+):", lambda a, b: str(int(a) + int(b)), _sums, train=60, held_out=20),
    "opposite": Task(
        r"opposite of ([a-z]+):",
        _OPPOSITE_OF.__getitem__,
        functools.partial(_facts, form="opposite of {}:", table=_OPPOSITE_OF),
        train=len(_OPPOSITE_OF) - 12,
        held_out=12,
    ),
    "capital": Task(
        r"capital of ([A-Za-z]+):",
        _CAPITAL_OF.__getitem__,
        functools.partial(_facts, form="capital of {}:", table=_CAPITAL_OF),
        train=len(_CAPITAL_OF) - 8,
        held_out=8,
    ),
}
