"""Prompts from files and tasks, and rewards written in Python: what they give, and how their failures are told."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interop import ByteTokenizer, RowFileError
from jaxalign.interop.prompt_data import PromptData, PromptRow, prompt_text, read_prompts
from jaxalign.interop.text_rewards import TextReward, each, load_reward_function
from jaxalign.interop.verifiable_tasks import TASKS
from jaxalign.rlhf.generation import Completions
from jaxalign.rlhf.language_rollout import Prompts
from jaxalign.rlhf.verifiable_rewards import format_reward, last_number, length_reward, number_reward

TOKENIZER = ByteTokenizer()
ROWS = [PromptRow("2+2=", {"answer": 4}), PromptRow("3+3=", {"answer": 6}), PromptRow("long enough", {"answer": 1})]


def prompts(**options):
    texts = [prompt_text(row, TOKENIZER) for row in ROWS]
    return PromptData(texts, TOKENIZER, **{"batch_size": 2, "seed": 0, "pad_id": 0, "max_length": 12, **options})


def completions(texts):
    rows = TOKENIZER.encode_batch(texts)
    tokens = np.zeros((len(rows), 9), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[1 : 1 + len(ids)] = ids
    mask = (np.arange(9) >= 1) & (np.arange(9) < 1 + np.array([len(ids) for ids in rows])[:, None])
    return Completions(jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(mask.shape), jnp.ones(len(rows), bool))


def pay(reward, texts, index=(0, 1)):
    asked = Prompts(jnp.zeros((len(index), 1), jnp.int32), jnp.ones(len(index), jnp.int32), jnp.asarray(index))
    return np.asarray(jax.jit(reward.network.apply)({}, asked, completions(texts)))


def test_rewards_on_text_by_hand():
    assert (last_number("a 1 b -2,000.5."), last_number("none")) == (-2000.5, None)
    assert (number_reward("it is 4", 4), number_reward("4, no: 5", 4), number_reward("", 4)) == (1.0, 0.0, 0.0)
    assert (length_reward("a b c", 3), length_reward("a b c d", 2), length_reward(" ", 3)) == (1.0, 0.5, 0.0)
    assert (format_reward(" - a\n- b\n", r"(- [^\n]+\n?)+"), format_reward("so: - a", r"- .+")) == (1.0, 0.0)
    with pytest.raises(ValueError, match="words must be at least 1, got 0"):
        length_reward("a", 0)


def test_batches_cover_the_prompts_and_depend_on_the_step_alone():
    data = prompts()
    first = data.batch(0)
    assert first.tokens.shape == (2, data.width)
    assert data.width == 12  # the longest, to a multiple of 8, cut at max_length
    for row, length, index in zip(*first, strict=True):
        assert TOKENIZER.decode(row[:length]) == ROWS[index].prompt
    np.testing.assert_array_equal(first.index, data.batch(0).index)
    seen = {int(i) for step in range(40) for i in data.batch(step).index}
    assert seen == {0, 1, 2}  # those left over at an epoch's end come in another
    later = prompts(first=5)
    np.testing.assert_array_equal(later.rows(np.array([1])).index, [6])


def test_prompts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r'prompt 2 \("long enough"...\) has 11 tokens; allowed are 1 to 8'):
        prompts(max_length=8)
    with pytest.raises(ValueError, match="batch_size 4 of 3 prompts"):
        prompts(batch_size=4)


def test_files_of_prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"prompt": "a", "answer": 3}) + "\n" + json.dumps({"prompt": messages}) + "\n")
    assert read_prompts(path) == [PromptRow("a", {"answer": 3}), PromptRow(tuple(messages), {})]
    for bad in ('{"question": "a"}', '{"prompt": [1]}', "[]", "nonsense"):
        path.write_text('{"prompt": "a"}\n' + bad + "\n")
        with pytest.raises(RowFileError, match=r"p\.jsonl, line 2"):
            read_prompts(path)
    path.write_text("")
    with pytest.raises(RowFileError, match="holds no rows"):
        read_prompts(path)


def test_a_python_function_pays_inside_a_compiled_step():
    reward = TextReward(each(lambda text, answer: number_reward(text, answer)), TOKENIZER, ROWS)
    np.testing.assert_array_equal(pay(reward, ["is 4", "7"]), [1.0, 0.0])
    np.testing.assert_array_equal(pay(reward, ["6", "is 1"], index=(1, 2)), [1.0, 1.0])
    assert reward.failure is None


def test_it_is_given_prompts_completions_and_columns_as_lists():
    asked = []

    def judge(prompts, completions, answer):
        asked.append((prompts, completions, answer))
        return [0.5, 1]

    np.testing.assert_array_equal(pay(TextReward(judge, TOKENIZER, ROWS), ["a", "b"], index=(2, 0)), [0.5, 1.0])
    assert asked == [(["long enough", "2+2="], ["a", "b"], [1, 4])]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], r"judge returned values of shape \(1,\) for 2 completions"),
        ([1.0, float("nan")], "judge returned nan for 'b'"),
    ],
)
def test_unusable_values_become_nan_with_a_reason(values, message):
    def judge(prompts, completions, answer):
        return values

    reward = TextReward(judge, TOKENIZER, ROWS)
    assert np.isnan(pay(reward, ["a", "b"])).all()
    with pytest.raises(ValueError, match=message):
        reward.scores([0, 1], ["a", "b"], [True, True])
    assert "judge returned" in reward.failure


def test_it_may_ask_which_completions_ended():
    def judge(prompts, completions, answer, ended):
        return [float(x) for x in ended]

    said = completions(["a", "b"])._replace(ended=jnp.array([True, False]))
    asked = Prompts(jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32), jnp.arange(2))
    paid = TextReward(judge, TOKENIZER, ROWS).network.apply({}, asked, said)
    np.testing.assert_array_equal(paid, [1.0, 0.0])


def test_a_function_that_raises_is_named():
    def judge(**anything):
        raise KeyError("no such thing")

    reward = TextReward(judge, TOKENIZER, ROWS)
    assert np.isnan(pay(reward, ["a", "b"])).all()
    assert reward.failure == "KeyError: 'no such thing'"


def test_functions_come_from_files(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def reward(prompts, completions, **rest):\n    return [len(c) for c in completions]\nother = 3\n")
    assert load_reward_function(str(path))(prompts=[], completions=["ab"]) == [2]
    assert load_reward_function(f"{path}:reward")(prompts=[], completions=["ab"]) == [2]
    with pytest.raises(ValueError, match=r"mine\.py: has no function 'other'"):
        load_reward_function(f"{path}:other")
    with pytest.raises(FileNotFoundError, match=r"gone\.py: no such file"):
        load_reward_function(str(tmp_path / "gone.py"))


@pytest.mark.parametrize("name", TASKS)
def test_tasks_pay_right_answers_and_not_wrong_ones(name):
    task = TASKS[name]()
    assert len({str(row.prompt) for row in task.rows}) == len(task.rows) >= 200
    columns = {field: [row.fields[field] for row in task.rows] for field in task.rows[0].fields}
    columns["ended"] = [True] * len(task.rows)
    right = {
        "arithmetic": lambda fields: f"The answer is {fields['answer']}.",
        "length": lambda fields: " ".join(["word"] * fields["words"]),
        "bullets": lambda fields: "- one\n- two",
    }[name]
    given = [row.prompt for row in task.rows]
    good = task.reward(prompts=given, completions=[right(row.fields) for row in task.rows], **columns)
    bad = task.reward(prompts=given, completions=["I do not know" * 40] * len(given), **columns)
    assert set(good) == {1.0}
    assert max(bad) < 0.5
