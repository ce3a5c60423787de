"""Properties of networks in VNN-LIB, the language of the verification competition: a subset of SMT-LIB."""

import gzip
import itertools
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.certification.properties import Property, UnsafeCase

TOKEN = re.compile(r'(?P<space>\s+|;[^\n]*)|(?P<atom>"[^"\n]*"|[^\s()\[\];"]*\[[^\]()]*\]|[^\s()\[\];"]+)|(?P<odd>.)')
NUMBERED = re.compile(r"([XY])_(\d+)")
ELEMENT = re.compile(r"(\w+)\[([\d,\s]*)\]")
MOST_CASES = 100_000


class _Text(NamedTuple):
    """A word, and the line it is on."""

    word: str
    line: int


class _Form(NamedTuple):
    """What stands between two parentheses."""

    items: list[Any]
    line: int

    @property
    def head(self) -> str:
        """The word after the parenthesis, if it is a word."""
        return self.items[0].word if self.items and isinstance(self.items[0], _Text) else ""


class _Linear(NamedTuple):
    """constant + sum of coefficients times variables; a variable is ("X", i) or ("Y", j)."""

    terms: dict[tuple[str, int], float]
    constant: float


class _Part(NamedTuple):
    """What a conjunction has left: a box, rows, and why nothing satisfies it, if nothing does."""

    lower: np.ndarray
    upper: np.ndarray
    weights: list[np.ndarray]
    offsets: list[float]
    empty: ValueError | None


class _AtMostZero(NamedTuple):
    """The condition `value` <= 0, or < 0 where `strict`."""

    value: _Linear
    strict: bool
    line: int


def read_vnnlib(path_or_text: str | os.PathLike[str]) -> Property:
    """Read a property from a file (also one that ends in .gz), or from text: what begins with a parenthesis or comment.

    Version 1 of the language, with variables X_i and Y_j, and of version 2 what says the same of one network with one
    input and one output: `declare-network`, and elements as X[0,1], counted in C order. Assertions combine with `and`
    and `or`, nested as one likes, the comparisons <=, >=, <, >, == of linear terms. They say what is unsafe. The result
    is their disjunctive normal form: every case has its own box [N] and rows [M, K]. A strict comparison moves its
    bound by one float64.

    Raises FileNotFoundError, and ValueError naming file and line for unbalanced parentheses, an unknown symbol, terms
    that are not linear, conditions on inputs that are not a box or are mixed with outputs, an input without two bounds,
    and one whose bounds leave nothing in every case.
    """
    text = os.fspath(path_or_text)
    if isinstance(path_or_text, str) and text.lstrip()[:1] in ("(", ")", ";"):
        return _Reader("property").read(text)
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable text file: {error}") from error
    return _Reader(str(path)).read(text)


class _Reader:
    """One file: the variables it has declared so far, and its name for messages."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}  # version 2: name to X or Y, and the shape
        self._declared: dict[str, set[int]] = {"X": set(), "Y": set()}

    def read(self, text: str) -> Property:
        """The whole text [...] as a property."""
        assertions: list[list[list[_AtMostZero]]] = []
        for form in self._forms(text):
            if form.head == "assert" and len(form.items) == 2:
                assertions.append(self._condition(form.items[1]))
            elif form.head in ("declare-const", "declare-fun"):
                self._declare(form)
            elif form.head == "declare-network":
                self._declare_network(form)
            elif form.head not in ("vnnlib-version", "set-logic", "set-info", "set-option", "check-sat", "exit"):
                raise self._error(form, f"{form.head or 'a form without a name'!r} is not read")
        for side, kind in (("X", "input"), ("Y", "output")):
            numbers = self._declared[side]
            if numbers != set(range(len(numbers))) or not numbers:
                raise ValueError(f"{self._name}: the {kind}s {side} must be declared from 0 on without a gap")
        return self._property(assertions)

    def _error(self, where: Any, message: str) -> ValueError:
        return ValueError(f"{self._name}, line {where if isinstance(where, int) else where.line}: {message}")

    def _forms(self, text: str) -> list[_Form]:
        """The parenthesised forms of the text."""
        outer = _Form([], 1)
        open_forms, line = [outer], 1
        for match in TOKEN.finditer(text):
            token = match.group()
            if match["atom"]:
                open_forms[-1].items.append(_Text(token, line))
            elif token == "(":
                open_forms.append(_Form([], line))
            elif token == ")":
                closed = open_forms.pop()
                if not open_forms:
                    raise self._error(line, "a closing parenthesis that nothing opened")
                open_forms[-1].items.append(closed)
            elif match["odd"]:
                raise self._error(line, f"cannot read {token!r}")
            line += token.count("\n")
        if len(open_forms) > 1:
            raise self._error(open_forms[-1], "a parenthesis opens here and is never closed")
        for item in outer.items:
            if isinstance(item, _Text):
                raise self._error(item, f"{item.word!r} stands outside all parentheses")
        return outer.items

    def _declare(self, form: _Form) -> None:
        name = form.items[1].word if len(form.items) > 2 and isinstance(form.items[1], _Text) else ""
        match = NUMBERED.fullmatch(name)
        if match is None:
            raise self._error(form, f"a variable must be called X_0, X_1, ... or Y_0, ..., got {name!r}")
        if getattr(form.items[-1], "word", "") != "Real":
            raise self._error(form, f"{name} must be Real")
        self._declared[match[1]].add(int(match[2]))

    def _declare_network(self, form: _Form) -> None:
        for item in form.items[2:]:
            side = {"declare-input": "X", "declare-output": "Y"}.get(getattr(item, "head", ""))
            words = [getattr(word, "word", "") for word in item.items] if side else []
            if side is None or self._declared[side] or len(words) < 4 or not re.fullmatch(r"\[[\d,\s]*\]", words[3]):
                message = "a network must have one input and one output, each as (declare-... name type [shape])"
                raise self._error(item, message)
            shape = tuple(int(size) for size in words[3][1:-1].split(",") if size.strip())
            self._shapes[words[1]] = (side, shape)
            self._declared[side] = set(range(math.prod(shape)))

    def _variable(self, text: _Text) -> tuple[str, int]:
        if (match := NUMBERED.fullmatch(text.word)) and int(match[2]) in self._declared[match[1]]:
            return match[1], int(match[2])
        if (match := ELEMENT.fullmatch(text.word)) and match[1] in self._shapes:
            side, shape = self._shapes[match[1]]
            place = [int(i) for i in match[2].split(",") if i.strip()]
            if len(place) == len(shape) and all(i < size for i, size in zip(place, shape, strict=True)):
                return side, int(np.ravel_multi_index(place, shape)) if shape else 0
            raise self._error(text, f"{text.word} is outside the declared shape {list(shape)}")
        if text.word in self._shapes and self._shapes[text.word][1] == ():
            return self._shapes[text.word][0], 0
        raise self._error(text, f"unknown symbol {text.word!r}")

    def _linear(self, item: Any) -> _Linear:
        """A term as a linear expression."""
        if isinstance(item, _Text):
            try:
                value = float(item.word)
            except ValueError:
                return _Linear({self._variable(item): 1.0}, 0.0)
            if not math.isfinite(value):
                raise self._error(item, f"the number {item.word} is not finite")
            return _Linear({}, value)
        parts = [self._linear(part) for part in item.items[1:]]
        if not parts or item.head not in ("+", "-", "*", "/"):
            raise self._error(item, f"{item.head or 'a form without a name'!r} is not a linear term")
        if item.head in ("+", "-"):
            sign = 1.0 if item.head == "+" else -1.0
            first = parts[0] if len(parts) > 1 or item.head == "+" else _scaled(parts[0], -1.0)
            return _sum([first, *(_scaled(part, sign) for part in parts[1:])])
        result = parts[0]
        for part in parts[1:]:
            if item.head == "*" and not result.terms:
                result = _scaled(part, result.constant)
            elif part.terms or (item.head == "/" and part.constant == 0):
                raise self._error(item, f"({item.head} ...) of these terms is not linear")
            else:
                result = _scaled(result, part.constant if item.head == "*" else 1 / part.constant)
        return result

    def _condition(self, item: Any) -> list[list[_AtMostZero]]:
        """A condition in disjunctive normal form: any of the lists, all in a list."""
        head = getattr(item, "head", "")
        if head in ("and", "or"):
            parts = [self._condition(part) for part in item.items[1:]]
            return self._product(parts) if head == "and" else [case for part in parts for case in part]
        if head not in ("<=", ">=", "<", ">", "==", "=") or len(item.items) != 3:
            raise self._error(item, f"{head or getattr(item, 'word', '')!r} is not a condition that is read")
        left, right = (self._linear(part) for part in item.items[1:])
        below = _sum([left, _scaled(right, -1.0)])
        signs = {"<": (1.0,), ">": (-1.0,)}.get(head[0], (1.0, -1.0))
        return [[_AtMostZero(_scaled(below, sign), head in "<>", item.line) for sign in signs]]

    def _product(self, parts: list[list[list[_AtMostZero]]]) -> list[list[_AtMostZero]]:
        """All of several conditions, each in disjunctive normal form."""
        count = math.prod(len(part) for part in parts)
        if count > MOST_CASES:
            raise ValueError(f"{self._name}: the conditions make {count:,} cases; read are {MOST_CASES:,} at most")
        return [list(itertools.chain(*choice)) for choice in itertools.product(*parts)]

    def _property(self, assertions: list[list[list[_AtMostZero]]]) -> Property:
        """What all assertions say together; those without a choice are taken once, into the part all cases share."""
        inputs, outputs = len(self._declared["X"]), len(self._declared["Y"])
        shared = _Part(np.full(inputs, -np.inf), np.full(inputs, np.inf), [], [], None)
        for assertion in assertions:
            if len(assertion) == 1:
                shared = self._narrowed(shared, assertion[0], outputs)
        choices = self._product([assertion for assertion in assertions if len(assertion) != 1])
        parts = [self._narrowed(shared, choice, outputs) for choice in choices]
        kept = [part for part in parts if part.empty is None]
        if not kept:
            errors = (part.empty for part in parts if part.empty is not None)
            raise next(errors, ValueError(f"{self._name}: no assertion can be true"))
        for part in kept:
            bounded = np.isfinite(part.lower) & np.isfinite(part.upper)
            if not bounded.all():
                i = int(np.argmin(bounded))
                sides = f"[{part.lower[i]}, {part.upper[i]}]"
                raise ValueError(f"{self._name}: X_{i} is not bounded on both sides: {sides}")
        cases = [
            UnsafeCase(
                part.lower, part.upper, np.array(part.weights).reshape(-1, outputs), np.array(part.offsets) + 0.0
            )
            for part in kept
        ]
        return Property(tuple(cases), inputs, outputs).check()

    def _narrowed(self, part: _Part, conditions: list[_AtMostZero], outputs: int) -> _Part:
        """The part where these conditions hold as well."""
        lower, upper, weights, offsets = part.lower.copy(), part.upper.copy(), [*part.weights], [*part.offsets]
        empty = part.empty
        for (terms, constant), strict, line in conditions:
            sides = {side for side, _ in terms}
            if not sides:
                if constant > 0 or (strict and constant == 0):
                    empty = empty or self._error(line, "this never holds")
            elif sides == {"Y"}:
                row = np.zeros(outputs)
                row[[j for _, j in terms]] = list(terms.values())
                weights.append(row)
                offsets.append(np.nextafter(-constant, -np.inf) if strict else -constant)
            elif len(terms) > 1:
                raise self._error(line, "a condition on inputs must bound one of them by itself, as a box does")
            else:
                (((_, i), coefficient),) = terms.items()
                bound = -constant / coefficient
                if coefficient > 0:
                    upper[i] = min(upper[i], np.nextafter(bound, -np.inf) if strict else bound)
                else:
                    lower[i] = max(lower[i], np.nextafter(bound, np.inf) if strict else bound)
                if lower[i] > upper[i]:
                    empty = empty or self._error(line, f"X_{i}: lower bound {lower[i]} is above upper bound {upper[i]}")
        return _Part(lower, upper, weights, offsets, empty)


def _scaled(linear: _Linear, factor: float) -> _Linear:
    return _Linear({name: factor * value for name, value in linear.terms.items()}, factor * linear.constant)


def _sum(parts: list[_Linear]) -> _Linear:
    terms: dict[tuple[str, int], float] = {}
    for part in parts:
        for name, value in part.terms.items():
            terms[name] = terms.get(name, 0.0) + value
    return _Linear({name: value for name, value in terms.items() if value}, sum(part.constant for part in parts))
