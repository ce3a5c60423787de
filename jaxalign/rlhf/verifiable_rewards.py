"""Rewards that a program can check, on text: plain Python, one completion at a time; all lie in [0, 1]."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number written in a text, thousands separators dropped; None if there is none.

    >>> last_number("12 + 30 is 1,042."), last_number("none")
    (1042.0, None)
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def number_reward(text: str, answer: float) -> float:
    """1 if the last number in the text is `answer`, else 0.

    >>> number_reward("7 + 5 = 12", 12), number_reward("12, or 13", 12)
    (1.0, 0.0)
    """
    return float(last_number(text) == answer)


def length_reward(text: str, words: int) -> float:
    """min(n, words) / max(n, words) for a text of n words (runs of non-space): 1 at the wished length, nowhere flat.

    >>> length_reward("one two three", 4), length_reward("", 4)
    (0.75, 0.0)
    """
    if words < 1:
        raise ValueError(f"length_reward: words must be at least 1, got {words}")
    count = len(text.split())
    return min(count, words) / max(count, words)


def format_reward(text: str, pattern: str) -> float:
    """1 if the whole text, white space around it aside, matches a regular expression ("." matches line ends), else 0.

    >>> format_reward(" - a\\n- b ", r"(- .+\\n?){2}")
    1.0
    """
    return float(re.fullmatch(pattern, text.strip(), re.DOTALL) is not None)
