import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.interop.byte_tokenizer import ByteTokenizer
from jaxalign.interop.preference_data import PreferenceData, TokenizedPair, tokenize_pairs
from jaxalign.interop.preference_files import PreferencePair

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_id
PAD = TOKENIZER.pad_id
MESSAGES = PreferencePair(
    ({"role": "user", "content": "q"},),
    ({"role": "assistant", "content": "yes"},),
    ({"role": "assistant", "content": "no"},),
)


class Templated(ByteTokenizer):
    """A template whose turns end in the end token and a newline, as ChatML's do."""

    chat_template = "<role>content<end>\n"

    def render(self, messages, *, add_generation_prompt=False):
        turns = "".join(f"<{m['role']}>{m['content']}\x01\n" for m in messages)
        return turns + ("<assistant>" if add_generation_prompt else "")

    def encode(self, text):
        return [EOS if byte == 1 else byte for byte in text.encode()]


class Merging(ByteTokenizer):
    """One token for ": a", which straddles the boundary between "q: " and "a..."."""

    def encode(self, text):
        return [300 if char == "\x00" else ord(char) for char in text.replace(": a", "\x00")]


def text_of(tokens):
    return TOKENIZER.decode(tokens)


def test_text_pairs_by_hand():
    (pair,), indices, dropped, truncated = tokenize_pairs([PreferencePair("ab", "c", "de")], TOKENIZER, max_length=9)
    assert pair.chosen_tokens.tolist() == [97, 98, 99, EOS]
    assert pair.rejected_tokens.tolist() == [97, 98, 100, 101, EOS]
    assert pair.prompt_length == 2
    assert pair.chosen_tokens.dtype == np.int32
    assert (indices.tolist(), dropped, truncated) == ([0], [], 0)


def test_messages_end_as_their_template_ends():
    (pair,) = tokenize_pairs([MESSAGES], Templated(), max_length=99).pairs
    assert text_of(pair.chosen_tokens[: pair.prompt_length]) == "<user>q\n<assistant>"
    assert pair.chosen_tokens[pair.prompt_length :].tolist() == [*b"yes", EOS, 10]
    assert pair.rejected_tokens[pair.prompt_length :].tolist() == [*b"no", EOS, 10]


def test_messages_without_a_template_are_plain_lines_with_an_end():
    (pair,) = tokenize_pairs([MESSAGES], TOKENIZER, max_length=99).pairs
    assert text_of(pair.chosen_tokens[: pair.prompt_length]) == "user: q\nassistant:"
    assert pair.chosen_tokens[pair.prompt_length :].tolist() == [*b" yes", EOS]


def test_a_token_merged_across_the_boundary_belongs_to_both_answers():
    (pair,) = tokenize_pairs([PreferencePair("q: ", "a", "b")], Merging(), max_length=99).pairs
    assert pair.prompt_length == 1
    assert pair.chosen_tokens.tolist() == [ord("q"), 300, EOS]
    assert pair.rejected_tokens.tolist() == [*b"q: b", EOS]


def test_begin_token():
    pairs = [PreferencePair("p", "a", "b"), PreferencePair("", "a", "b")]
    plain = tokenize_pairs(pairs, TOKENIZER, max_length=9).pairs
    assert [pair.chosen_tokens.tolist()[:-1] for pair in plain] == [[112, 97], [256, 97]]
    begun = tokenize_pairs(pairs, TOKENIZER, max_length=9, add_bos=True).pairs
    assert [pair.chosen_tokens.tolist()[:-1] for pair in begun] == [[256, 112, 97], [256, 97]]
    assert [pair.prompt_length for pair in begun] == [2, 1]
    without = ByteTokenizer()
    without.bos_id = None
    assert tokenize_pairs(pairs, without, max_length=9).pairs[1].chosen_tokens[0] == EOS
    with pytest.raises(ValueError, match="no begin token"):
        tokenize_pairs(pairs, without, max_length=9, add_bos=True)
    without.eos_id = None
    with pytest.raises(ValueError, match="no begin or end token"):
        tokenize_pairs(pairs, without, max_length=9)


def test_truncation_by_hand():
    pairs = [
        PreferencePair("0123456789", "ab", "abc"),  # 10 + 4 > 8: four prompt tokens stay
        PreferencePair("0123456789", "x" + "a" * 20, "b"),  # the longer answer is cut to 7 and has no end
        PreferencePair("01", "a" * 20 + "b", "a" * 20 + "c"),
        PreferencePair("01", "a", "a"),
        PreferencePair("0123", "abc", "d"),  # 4 + 4: fits
    ]
    pairs, indices, dropped, truncated = tokenize_pairs(pairs, TOKENIZER, max_length=8)
    assert text_of(pairs[0].chosen_tokens) == "6789ab"
    assert text_of(pairs[0].rejected_tokens) == "6789abc"
    assert pairs[0].prompt_length == 4
    assert pairs[1].chosen_tokens.tolist() == list(b"9xaaaaaa")
    assert pairs[1].rejected_tokens.tolist() == [*b"9b", EOS]
    assert indices.tolist() == [0, 1, 4]
    assert dropped == [(2, "the answers are equal after truncation"), (3, "the answers are equal")]
    assert truncated == 2


def test_answers_without_tokens_are_dropped():
    endless = ByteTokenizer()
    endless.eos_id = None
    result = tokenize_pairs([PreferencePair("p", "", "b"), PreferencePair("p", "a", "b")], endless, max_length=9)
    assert result.dropped == [(0, "an answer has no tokens")]
    assert result.pairs[0].chosen_tokens.tolist() == [112, 97]


def test_bad_requests():
    with pytest.raises(ValueError, match="max_length"):
        tokenize_pairs([MESSAGES], TOKENIZER, max_length=1)
    with pytest.raises(ValueError, match="pair 1 mixes"):
        tokenize_pairs([MESSAGES, MESSAGES._replace(prompt="q")], TOKENIZER, max_length=9)


TEXT = st.text("abc ", max_size=10)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5), st.integers(2, 16))
def test_truncated_pairs_share_their_prompt_and_keep_the_answer(texts, max_length):
    result = tokenize_pairs([PreferencePair(*text) for text in texts], TOKENIZER, max_length=max_length)
    assert sorted([*result.indices.tolist(), *(index for index, _ in result.dropped)]) == list(range(len(texts)))
    for index, pair in zip(result.indices, result.pairs, strict=True):
        prompt, *answers = texts[index]
        n = pair.prompt_length
        assert n >= 1
        np.testing.assert_array_equal(pair.chosen_tokens[:n], pair.rejected_tokens[:n])
        assert text_of(pair.chosen_tokens[:n]) == prompt[len(prompt) - n :] if prompt else n == 1
        for answer, tokens in zip(answers, (pair.chosen_tokens, pair.rejected_tokens), strict=True):
            assert len(tokens) <= max_length
            assert tokens[n:].tolist() == [*answer.encode(), EOS][: max_length - 1]


def numbered(lengths):
    """Pairs of the given lengths whose first token is their number."""
    make = [np.arange(i, i + n, dtype=np.int32) for i, n in enumerate(lengths)]
    return [TokenizedPair(tokens, np.append(tokens[:-1], 7777).astype(np.int32), 1 + i % 2)
            for i, tokens in enumerate(make)]


def data_of(lengths, **options):
    options = {"batch_size": 4, "seed": 3, "pad_id": 9999, "buckets": (4, 8, 16), **options}
    return PreferenceData(numbered(lengths), **options)


LENGTHS = st.lists(st.integers(3, 16), min_size=1, max_size=40)


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.integers(1, 6), st.integers(0, 3), st.integers(1, 3), st.integers(0, 2))
def test_every_pair_is_valid_exactly_once_an_epoch(lengths, batch_size, seed, run_length, epoch):
    data = data_of(lengths, batch_size=batch_size, seed=seed, run_length=run_length)
    assert len(data) == len(lengths)
    steps = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
    batches = [data.batch(step) for step in steps]
    assert sorted(np.concatenate([b.chosen_tokens[b.valid, 0] for b in batches])) == list(range(len(lengths)))
    assert sum(not b.valid.all() for b in batches) <= 1
    assert all(b.valid.any() for b in batches)
    assert {b.chosen_tokens.shape for b in batches} <= {(batch_size, T) for T in data.buckets}
    assert [data.length(step) for step in steps] == [b.chosen_tokens.shape[1] for b in batches]
    assert sum(data.tokens(step) for step in steps) == 2 * sum(lengths)


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(0, 30))
def test_tokens_and_masks_are_those_of_the_pairs(lengths, step):
    pairs, data = numbered(lengths), data_of(lengths)
    batch = data.batch(step)
    assert batch.chosen_tokens.dtype == batch.rejected_tokens.dtype == np.int32
    assert batch.chosen_mask.dtype == batch.rejected_mask.dtype == batch.valid.dtype == bool
    for row, number in enumerate(batch.chosen_tokens[:, 0]):
        pair = pairs[number]
        for tokens, mask, real in (
            (batch.chosen_tokens[row], batch.chosen_mask[row], pair.chosen_tokens),
            (batch.rejected_tokens[row], batch.rejected_mask[row], pair.rejected_tokens),
        ):
            np.testing.assert_array_equal(tokens[: len(real)], real)
            np.testing.assert_array_equal(tokens[len(real) :], data.pad_id)
            np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(pair.prompt_length, len(real)))


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def test_a_batch_is_a_function_of_seed_and_step():
    lengths = [3, 5, 9, 16] * 12
    first, again = data_of(lengths), data_of(lengths)
    forward = [first.batch(step) for step in range(30)]
    backward = [again.batch(step) for step in reversed(range(30))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    other = data_of(lengths, seed=4)
    assert not all(equal(a, other.batch(step)) for step, a in enumerate(forward))
    epoch = first.steps_per_epoch
    assert not all(equal(forward[step], forward[step + epoch]) for step in range(epoch))
    with pytest.raises(ValueError, match="step"):
        first.batch(-1)


def test_lanes_share_the_shape_and_differ_in_the_pairs():
    lengths = [3, 5, 9, 16] * 11 + [3]
    data = data_of(lengths).with_reference(np.arange(45.0), -np.arange(45.0))
    seen = [[], [], []]
    for step in range(data.steps_per_epoch):
        lanes = data.lanes(step, [3, 8, 3])
        assert lanes.chosen_tokens.shape == (3, 4, data.length(step))
        assert equal(jax.tree.map(lambda x: x[0], lanes), data.batch(step))
        assert equal(jax.tree.map(lambda x: x[0], lanes), jax.tree.map(lambda x: x[2], lanes))
        np.testing.assert_array_equal(lanes.reference_chosen_logps, lanes.chosen_tokens[..., 0])
        for lane in range(3):
            seen[lane] += lanes.chosen_tokens[lane, lanes.valid[lane], 0].tolist()
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(45))
    assert seen[0] != seen[1]
    with pytest.raises(ValueError, match="seed"):
        data.lanes(0, [])


def test_runs_of_one_bucket_stay_together_and_are_shuffled():
    data = data_of([4, 8, 16] * 48, run_length=3)
    lengths = [data.length(step) for step in range(36)]
    runs = [lengths[i : i + 3] for i in range(0, 36, 3)]
    assert all(len(set(run)) == 1 for run in runs)
    assert [run[0] for run in runs] != sorted(run[0] for run in runs)


def test_reference_values_come_back_to_their_pairs():
    data = data_of([3, 5, 9, 16, 4] * 5 + [7])

    def score(batch):
        return batch.chosen_tokens[:, 0] * 1.0, {"length": (batch.chosen_tokens != data.pad_id).sum(axis=1)}

    numbers, lengths = data.collect(score)
    np.testing.assert_array_equal(numbers, np.arange(26))
    np.testing.assert_array_equal(lengths["length"], [3, 5, 9, 16, 4] * 5 + [7])
    assert sum(batch.valid.sum() for _, batch in data.in_order()) == 26
    for indices, batch in data.in_order():
        np.testing.assert_array_equal(indices, batch.chosen_tokens[:, 0])

    carrying = data.with_reference(numbers, -numbers)
    assert data.batch(0).reference_chosen_logps is None
    for step in range(14):
        batch = carrying.batch(step)
        np.testing.assert_array_equal(batch.reference_chosen_logps, batch.chosen_tokens[:, 0])
        np.testing.assert_array_equal(batch.reference_rejected_logps, -batch.chosen_tokens[:, 0])
        assert equal(batch._replace(reference_chosen_logps=None, reference_rejected_logps=None), data.batch(step))


def test_reference_values_are_checked():
    data = data_of([3, 4])
    with pytest.raises(ValueError, match=r"rejected_logps must be \[2\], got \[3\]"):
        data.with_reference(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"chosen_logps\[1\] is not finite"):
        data.with_reference(np.array([0.0, np.nan]), np.zeros(2))


def test_default_buckets_double_and_end_at_the_longest_pair():
    assert data_of([10, 60, 130, 300], buckets=None).buckets == (64, 128, 256, 304)
    assert data_of([3, 30], buckets=None).buckets == (32,)
    assert data_of([64], buckets=None).buckets == (64,)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"run_length": 0}, {"buckets": (4,)}, {"buckets": ()}])
def test_bad_sizes(options):
    with pytest.raises(ValueError, match="PreferenceData"):
        data_of([3, 5], **options)


def test_no_pairs():
    with pytest.raises(ValueError, match="at least one pair"):
        data_of([])
