"""The indirect object task: who receives the thing? "When Ann and Tom went to the park, Tom gave a ball to" (Ann).

Prompts with and without the clue, aligned position by position, for circuit finding. Wang et al. 2022,
"Interpretability in the Wild" (arXiv 2211.00593), section 2; templates and words are our own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, Key

NAMES = (
    "Mary John Tom James Dan Sarah Anna Mark Alice David Paul Kate Emma Peter Lucy Jack Laura Adam Simon Ruth Maria "
    "Kevin Amy Alex Sam Ben Emily Lisa Martin Eric Robert Michael Susan Julia Jane Rachel Daniel Thomas Henry Charles"
)
WORDS = {
    "[first]": "When After While Since Before Once",
    "[went]": "went drove walked came returned",
    "[place]": "store park school office station garden market beach museum library hospital church",
    "[found]": "found bought saw took picked",
    "[gave]": "gave handed offered passed showed sent brought",
    "[thing]": "book drink ring letter key box map gift ball hat phone ticket cup basket",
}
# Subject [S] and indirect object [IO] come in either order; every other slot is drawn from WORDS.
TEMPLATES = (
    "[first] [A] and [B] [went] to the [place], [S] [gave] the [thing] to",
    "Today [A] and [B] [found] a [thing] at the [place], and then [S] [gave] it to",
    "The friends [A] and [B] met at the [place], where [S] [gave] a [thing] to",
)


class IndirectObjectPrompts(NamedTuple):
    """N prompts from one template, so that position t is the same slot in all of them.

    clean: [N, T] tokens, A and B, then the subject again: even rows in the order IO, S (ABBA), odd ones S, IO (BABA)
    corrupted: [N, T] the same with three other names, so that nothing says who receives
    indirect_object, subject: [N] the right and the wrong next token
    slots: T texts, what stands at each position
    texts: N clean prompts
    """

    clean: Array
    corrupted: Array
    indirect_object: Array
    subject: Array
    slots: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def target(self) -> tuple[Array, Array]:
        """(indirect_object, subject), each [N], as `logit_difference` takes them."""
        return self.indirect_object, self.subject


def indirect_object_prompts(
    key: Key, count: int, encode: Callable[[str], Sequence[int]], *, template: int = 0
) -> IndirectObjectPrompts:
    """Draw `count` prompts [N, T] and their corrupted counterparts.

    Args:
        encode: text -> token ids, without special tokens. Only words that are one token after a space are used.
        template: index into TEMPLATES.

    Raises ValueError if there is no such template, `count` < 1, or the tokenizer leaves a slot without words or fewer
    than five names.
    """
    if not 0 <= template < len(TEMPLATES) or count < 1:
        raise ValueError(
            f"indirect_object_prompts: needs count >= 1 and template 0 .. {len(TEMPLATES) - 1}, got {count}, {template}"
        )
    names = [name for name in NAMES.split() if len(encode(f" {name}")) == 1]
    if len(names) < 5:
        raise ValueError(f"indirect_object_prompts: {len(names)} names are one token for this tokenizer; 5 are needed")
    pieces = TEMPLATES[template].replace(",", " ,").split()
    spaces = {slot: " " if pieces.index(slot) else "" for slot in WORDS if slot in pieces}
    words = {s: [word for word in WORDS[s].split() if len(encode(space + word)) == 1] for s, space in spaces.items()}
    if empty := [slot for slot, left in words.items() if not left]:
        raise ValueError(f"indirect_object_prompts: no word for {empty[0]} is one token for this tokenizer")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def written(filled: dict[str, str]) -> str:
        return " ".join(filled.get(piece, piece) for piece in pieces).replace(" ,", ",")

    texts, corrupted, answers = [], [], []
    for row in range(count):
        giver, receiver, *others = rng.choice(names, 5, replace=False)
        filled = {slot: str(rng.choice(left)) for slot, left in words.items()}
        a, b = (receiver, giver) if row % 2 == 0 else (giver, receiver)
        texts.append(written(filled | {"[A]": a, "[B]": b, "[S]": giver}))
        corrupted.append(written(filled | dict(zip(("[A]", "[B]", "[S]"), others, strict=True))))
        answers.append([encode(f" {name}")[-1] for name in (receiver, giver)])
    tokens = [list(encode(text)) for text in (*texts, *corrupted)]
    if len({len(row) for row in tokens}) > 1:
        raise ValueError(
            "indirect_object_prompts: prompts differ in length; the tokenizer merges words of the template"
        )
    ids, answer = np.asarray(tokens, np.int32), np.asarray(answers, np.int32)
    labels = _slots(pieces, encode, ids.shape[1])
    return IndirectObjectPrompts(*(jnp.asarray(x) for x in (ids[:count], ids[count:], *answer.T)), labels, tuple(texts))


def logit_difference(logits: Array, target: tuple[Array, Array]) -> Array:
    """`logits[b, indirect_object[b]] - logits[b, subject[b]]`, [B], in nats: the log odds of the right name.

    logits: [B, V], or [B, T, V], of which the last position counts. target: (indirect_object, subject), each [B].
    """
    last = logits if logits.ndim == 2 else logits[:, -1]
    right, wrong = (jnp.take_along_axis(last, answer[:, None], axis=1)[:, 0] for answer in target)
    return right - wrong


def negative_kl(logits: Array, reference: Array) -> Array:
    """`-KL(softmax(reference) || softmax(logits))`, [B], in nats: 0 where a circuit answers as the network does.

    logits, reference: [B, V], or [B, T, V], of which the last position counts.
    """
    q, p = (jax.nn.log_softmax(x if x.ndim == 2 else x[:, -1], axis=-1) for x in (logits, reference))
    return -jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _slots(pieces: list[str], encode: Callable[[str], Sequence[int]], length: int) -> tuple[str, ...]:
    """A label for each position: slots are one token, and so, as a rule, are the words between them."""
    labels = [piece.strip("[]") if piece[0] == "[" else piece for piece in pieces]
    counts = [1 if piece[0] == "[" else len(encode(piece if piece == "," else f" {piece}")) for piece in pieces]
    spread = [label for label, n in zip(labels, counts, strict=True) for label in (label, *["..."] * (n - 1))]
    return tuple(spread) if len(spread) == length else tuple(str(t) for t in range(length))
