import collections

import numpy as np
import pytest

from jaxalign.interop.byte_tokenizer import ByteTokenizer
from jaxalign.interop.embedded_pairs import TASKS, embedded_preferences, right_answer, task_of, verify
from jaxalign.interop.preference_data import tokenize_pairs

TRAIN, HELD_OUT = embedded_preferences()


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("larger of 9 and 10:", "10"),
        ("smaller of 46 and 20:", "20"),
        ("go on c d e:", "f"),
        ("go on u t:", "s"),
        ("earlier of m and c:", "c"),
        ("later of m and c:", "m"),
        ("copy tab:", "tab"),
        ("reverse tab:", "bat"),
        ("count a in banana:", "3"),
        ("19 plus 23:", "42"),
        ("opposite of cold:", "hot"),
        ("capital of Peru:", "Lima"),
    ],
)
def test_right_answers_by_hand(prompt, answer):
    assert right_answer(prompt) == answer
    assert verify(prompt, f" {answer}\n")
    assert not verify(prompt, answer + "x")
    assert not verify(prompt, "")


def test_a_prompt_of_no_task_is_refused():
    with pytest.raises(ValueError, match="tell me a joke"):
        verify("tell me a joke:", "no")


def test_every_pair_is_right_against_wrong():
    for pair in TRAIN + HELD_OUT:
        assert verify(pair.prompt, pair.chosen), pair
        assert not verify(pair.prompt, pair.rejected), pair
        assert pair.chosen.startswith(" ")
        assert pair.rejected.startswith(" ")


def test_no_prompt_is_in_both_parts_or_twice():
    prompts = [pair.prompt for pair in TRAIN + HELD_OUT]
    assert len(prompts) == len(set(prompts))


def test_sizes_and_shares_of_the_tasks():
    for part, field in ((TRAIN, "train"), (HELD_OUT, "held_out")):
        expected = {name: getattr(task, field) for name, task in TASKS.items()}
        assert collections.Counter(task_of(pair.prompt) for pair in part) == expected
    assert len(HELD_OUT) >= 100


def test_it_is_the_same_at_every_call():
    assert embedded_preferences() == (TRAIN, HELD_OUT)


def test_answers_fit_a_short_byte_sequence():
    tokenized = tokenize_pairs(TRAIN + HELD_OUT, ByteTokenizer(), max_length=48)
    assert tokenized.truncated == 0
    assert not tokenized.dropped


def test_length_does_not_tell_right_from_wrong():
    for part in (TRAIN, HELD_OUT):
        longer = [np.sign(len(pair.chosen) - len(pair.rejected)) for pair in part]
        assert abs(np.mean(longer)) < 0.02
        assert np.mean(np.equal(longer, 0)) > 0.9


def test_characters_of_the_answer_alone_do_not_tell_right_from_wrong():
    # A linear model on character counts and on (place, character), fitted on the training answers, must not transfer.
    def features(text):
        counts = np.zeros((5, 256))
        for place, byte in enumerate(text.encode()):
            counts[0, byte] += 1
            counts[min(place, 4), byte] += 1
        return counts.ravel()

    def differences(part):
        return np.stack([features(pair.chosen) - features(pair.rejected) for pair in part])

    x = differences(TRAIN)
    weights = np.linalg.solve(x.T @ x + 10.0 * np.eye(x.shape[1]), x.T @ np.ones(len(x)))
    margin = differences(HELD_OUT) @ weights
    accuracy = np.mean(margin > 0) + 0.5 * np.mean(margin == 0)
    # Four standard errors of a fair coin over the held-out pairs.
    assert abs(accuracy - 0.5) < 4 * 0.5 / np.sqrt(len(HELD_OUT))
