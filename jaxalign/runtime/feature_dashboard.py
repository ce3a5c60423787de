"""A page that shows what the features of a sparse autoencoder respond to and write: one file, offline, searchable."""

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.runtime.feature_dashboard_page import BODY, STYLE
from jaxalign.runtime.feature_dashboard_script import SCRIPT

KINDS = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "i4": np.int32, "f4": np.float32}


class FeaturePage(NamedTuple):
    """What the page shows of F features, S of them with examples.

    title, name: of the page, and of the autoencoder among those of `frontier`
    facts: lines for the overview
    tokens: [N, T] int, the rows of text
    texts: token id -> its text, for all ids in `tokens` and the logits
    density, maximum, mean: [F], the share of tokens a feature fires on, its largest and mean activation when it fires
    shown: [S] int, the features with examples, rising
    groups: (label, count) of each group of examples, the first the strongest; the counts add up to E
    places: [S, E] int, row * T + position of each example, -1 where there is none
    activations: [S, E, W], the feature on the W tokens around each example, 0 outside the row
    before: how many of the W stand before the example
    histogram: [S, bins] int, firings by strength, from 0 to the maximum
    top, bottom: ([S, n] values, [S, n] token ids) of the logits raised and lowered most, or None
    related: ([S, m] values, [S, m] features), the most correlated
    frontier: of each autoencoder of the run {"name", "l0": x, "explained_variance": [value, low, high]}
    """

    title: str
    name: str
    facts: Sequence[str]
    tokens: np.ndarray
    texts: Mapping[int, str]
    density: np.ndarray
    maximum: np.ndarray
    mean: np.ndarray
    shown: np.ndarray
    groups: Sequence[tuple[str, int]]
    places: np.ndarray
    activations: np.ndarray
    before: int
    histogram: np.ndarray
    top: tuple[np.ndarray, np.ndarray] | None
    bottom: tuple[np.ndarray, np.ndarray] | None
    related: tuple[np.ndarray, np.ndarray]
    frontier: Sequence[Mapping[str, Any]]


def page_data(page: FeaturePage) -> dict[str, Any]:
    """The page as JSON values: arrays in base64, tokens as numbers of a vocabulary, activations in 255 steps.

    Raises ValueError naming an array whose shape does not fit the others, and a token id without a text.
    """
    shown, examples = page.places.shape
    _check(page, shown, examples)
    ids = [page.tokens.ravel(), *(ends[1].ravel() for ends in (page.top, page.bottom) if ends is not None)]
    vocabulary = np.unique(np.concatenate(ids))
    if missing := [int(i) for i in vocabulary if int(i) not in page.texts]:
        raise ValueError(f"page_data: token {missing[0]} has no text ({len(missing)} have none)")

    def number(tokens: np.ndarray) -> dict[str, str]:
        return _array(np.searchsorted(vocabulary, tokens), "u2" if len(vocabulary) <= 1 << 16 else "u4")

    top, bottom = (ends or (np.zeros((shown, 0)), np.zeros((shown, 0), int)) for ends in (page.top, page.bottom))
    strongest = np.maximum(page.maximum[page.shown], 1e-30)[:, None, None]
    arrays = {
        "tokens": number(page.tokens),
        "density": _array(page.density, "f4"),
        "maximum": _array(page.maximum, "f4"),
        "mean": _array(page.mean, "f4"),
        "shown": _array(page.shown, "u4"),
        "places": _array(page.places, "i4"),
        # Rounded up, so that what fires at all is coloured.
        "activations": _array(np.ceil(255 * np.clip(page.activations / strongest, 0, 1)), "u1"),
        "histogram": _array(page.histogram, "u4"),
        "topValues": _array(top[0], "f4"),
        "topTokens": number(top[1]),
        "bottomValues": _array(bottom[0], "f4"),
        "bottomTokens": number(bottom[1]),
        "relatedValues": _array(page.related[0], "f4"),
        "relatedFeatures": _array(page.related[1], "u4"),
    }
    return {
        "title": page.title,
        "name": page.name,
        "facts": list(page.facts),
        "vocabulary": [page.texts[int(i)] for i in vocabulary],
        "length": page.tokens.shape[1],
        "before": page.before,
        "width": page.activations.shape[2],
        "examples": examples,
        "groups": [{"label": label, "count": count} for label, count in page.groups],
        "bins": page.histogram.shape[1],
        "effects": top[0].shape[1],
        "related": page.related[0].shape[1],
        "frontier": [dict(point) for point in page.frontier],
        "arrays": list(arrays),
        **arrays,
    }


def dashboard_html(page: FeaturePage) -> str:
    """The whole page; it refers to nothing outside itself. Its address may end in #feature=12&q=the&sort=often.

    About 0.8 KB a feature with 20 examples of 24 tokens, and 3 bytes a token of text. Raises ValueError as `page_data`.
    """
    # No "<" in the data: text may hold the end of a script.
    data = json.dumps(page_data(page), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(page.title)
    body = BODY.replace("__TITLE__", title).replace("__SCRIPT__", SCRIPT).replace("__DATA__", data)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>{body}</body>\n</html>\n"
    )


def write_dashboard(path: str | os.PathLike[str], page: FeaturePage) -> Path:
    """Write `dashboard_html` to `path`, making its directory, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dashboard_html(page), encoding="utf-8")
    return path


def _array(x: np.ndarray, kind: str) -> dict[str, str]:
    """Little-endian bytes in base64, with the name of their type."""
    data = np.ascontiguousarray(x, KINDS[kind]).astype(np.dtype(KINDS[kind]).newbyteorder("<"))
    return {"type": kind, "data": base64.b64encode(data.tobytes()).decode("ascii")}


def _check(page: FeaturePage, shown: int, examples: int) -> None:
    features = len(page.density)
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "maximum": (page.maximum, (features,)),
        "mean": (page.mean, (features,)),
        "shown": (page.shown, (shown,)),
        "activations": (page.activations, (shown, examples, None)),
        "histogram": (page.histogram, (shown, None)),
        "related": (page.related[0], (shown, None)),
    }
    for name, (array, shape) in expected.items():
        found = np.shape(array)
        if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
            raise ValueError(f"page_data: {name} is {found}, places is {page.places.shape} of {features} features")
    if sum(count for _, count in page.groups) != examples:
        raise ValueError(f"page_data: the groups hold {page.groups}, places {examples} examples")
