import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.interop.byte_tokenizer import ByteTokenizer, plain_dialogue

TOKENIZER = ByteTokenizer()
TALK = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."})


def test_ids_are_the_utf8_bytes():
    assert TOKENIZER.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert TOKENIZER.encode("") == []


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode_batch([text, "x"]) == [TOKENIZER.encode(text), [120]]


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_decode_and_special_ids_have_no_text(data):
    expected = data.decode("utf-8", errors="replace")
    assert TOKENIZER.decode([TOKENIZER.bos_id, *data, TOKENIZER.eos_id, TOKENIZER.pad_id]) == expected


def test_special_ids_are_distinct_and_inside_the_vocabulary():
    specials = {TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id}
    assert len(specials) == 3
    assert min(specials) == 256
    assert max(specials) == TOKENIZER.vocab_size - 1


@pytest.mark.parametrize("token", [-1, 259])
def test_an_unknown_token_is_named(token):
    with pytest.raises(ValueError, match=f"token {token} "):
        TOKENIZER.decode([65, token])


def test_a_lone_surrogate_is_refused():
    with pytest.raises(UnicodeEncodeError):
        TOKENIZER.encode("\ud800")


def test_the_generation_prompt_is_a_prefix_of_the_whole():
    prompt = TOKENIZER.render(TALK[:1], add_generation_prompt=True)
    assert prompt == "user: hi\nassistant:"
    assert TOKENIZER.render(TALK) == plain_dialogue(TALK) == prompt + " Hello."
