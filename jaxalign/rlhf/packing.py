"""Several sequences in one row, so that padding costs nothing: on the host, in NumPy, before a batch is sent off."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.rlhf.token_steps import TokenSteps


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of sequences whose lengths [N] add up to at most `width`: longest first, each into the first row with room.

    Raises ValueError naming a sequence that is longer than a row.

    >>> first_fit([3, 6, 2, 4], 8)
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in np.argsort(-np.asarray(lengths), kind="stable"):
        size = int(lengths[number])
        if size > width:
            raise ValueError(f"sequence {number} has {size} tokens; a row holds {width}")
        row = next((i for i, left in enumerate(room) if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(int(number))
        room[row] -= size
    return rows


def pack_steps(steps: TokenSteps, lengths: Sequence[int], *, width: int) -> TokenSteps:
    """TokenSteps [N, T], of which `lengths` [N] tokens are real, in M <= N rows [M, width] with `segments`.

    Segment k + 1 of a row is its k-th sequence, 0 the padding behind them. Losses and gradients are those of the
    unpacked steps, since `weights` and `share` were set while each sequence was still a row of its own.
    """
    rows = first_fit(lengths, width)

    def packed(values: Any) -> Any:
        if values is None:
            return None
        values = np.asarray(values)
        out = np.zeros((len(rows), width), values.dtype)
        for row, members in zip(out, rows, strict=True):
            joined = np.concatenate([values[i, : lengths[i]] for i in members])
            row[: len(joined)] = joined
        return out

    order = np.zeros(np.asarray(steps.tokens).shape, np.int32)
    for members in rows:
        for place, number in enumerate(members):
            order[number] = place + 1
    return TokenSteps(*(packed(x) for x in steps._replace(segments=order)))
