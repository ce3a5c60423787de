"""The tokenizer: ids worked out by hand, special tokens in chat text, templates, and saving."""

import json

import pytest
import tiny_models as tiny

from jaxalign.interop import Tokenizer

ID = {token: i for i, token in enumerate(tiny.VOCABULARY)}


def make(**options):
    return Tokenizer(tiny.small_bpe(), **{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **options})


def test_hand_worked_ids():
    """h+e, l+l, he+ll, hell+o; then Ġ+w, o+r, Ġw+or; é is the two bytes C3 A9."""
    tokenizer = make()
    assert tokenizer.encode("hello wor") == [ID["hello"], ID["Ġwor"]]
    assert tokenizer.encode("é") == [ID["Ã"], ID["©"]]
    assert tokenizer.encode("12123") == [ID["12"], ID["123"]]
    assert tokenizer.encode("") == []
    assert tokenizer.encode_batch(["hello", "12"]) == [[ID["hello"]], [ID["12"]]]


def test_special_tokens_in_text_become_single_ids():
    tokenizer = make()
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert ids == [0, ID["hello"], 1]
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hello<|im_end|>"


def test_ids_and_their_fallbacks():
    tokenizer = make()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert make(pad_token="<unk>").pad_id == 2
    bare = make(bos_token=None, eos_token=None)
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (None, None, None)
    assert tokenizer.vocab_size == len(tiny.VOCABULARY)
    with pytest.raises(ValueError, match=r"the pad token '<pad>' is not in the vocabulary"):
        make(pad_token="<pad>")


def test_padding_and_truncation_settings_are_switched_off():
    backend = tiny.small_bpe()
    backend.enable_truncation(1)
    backend.enable_padding(length=5)
    assert Tokenizer(backend).encode("hello wor") == [ID["hello"], ID["Ġwor"]]


def test_render_and_encode_a_chat():
    tokenizer = make(chat_template=tiny.TEMPLATE)
    messages = [{"role": "us", "content": "hello"}, {"role": "bot", "content": "or"}]
    text = tokenizer.render(messages, add_generation_prompt=True)
    assert text == "<|im_start|>us\nhello<|im_end|>\n<|im_start|>bot\nor<|im_end|>\n<|im_start|>"
    ids = tokenizer.encode(text)
    assert (ids.count(0), ids.count(1)) == (3, 2)
    assert tokenizer.render(messages) == text.removesuffix("<|im_start|>")


def test_render_reports_what_is_wrong():
    message = {"role": "user", "content": "x"}
    with pytest.raises(ValueError, match="no chat template"):
        make().render([message])
    with pytest.raises(ValueError, match="message 1 is not a mapping"):
        make(chat_template=tiny.TEMPLATE).render([message, "hello"])
    with pytest.raises(ValueError, match="refused the messages: roles must alternate"):
        make(chat_template="{{ raise_exception('roles must alternate') }}").render([message])
    with pytest.raises(ValueError, match=r"not valid Jinja: line 2"):
        make(chat_template="{{ messages }}\n{% if %}").render([message])
    with pytest.raises(ValueError, match="refused the messages"):  # the sandbox
        make(chat_template="{{ messages.__class__.__mro__ }}").render([message])
    with pytest.raises(ValueError, match="refused the messages"):
        make(chat_template="{% set _ = messages.append(1) %}").render([message])


def test_template_dialect():
    """What published templates use: loop controls, tojson without HTML escapes, dates, generation marks, variables."""
    template = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "    {% generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y') | length }}{{ tools | tojson(indent=1) }}"
    )
    messages = [{"role": "user", "content": "<é>"}, {"role": "skip", "content": "no"}]
    text = make(chat_template=template).render(messages, tools=[1])
    assert text == '<|im_start|>"<é>"4[\n 1\n]'


def test_save_and_load(tmp_path):
    tokenizer = make(chat_template=tiny.TEMPLATE, pad_token="<unk>", settings={"model_max_length": 128})
    tokenizer.save(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["eos_token"] == "<|im_end|>"
    again = Tokenizer.load(tmp_path)
    assert again.encode("hello <|im_end|>") == tokenizer.encode("hello <|im_end|>")
    assert (again.bos_id, again.eos_id, again.pad_id) == (0, 1, 2)
    assert again.chat_template == tiny.TEMPLATE
    assert again.settings["model_max_length"] == 128


def test_template_places(tmp_path):
    """chat_template.jinja wins over tokenizer_config.json, where several may stand by name."""
    make().save(tmp_path)
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert Tokenizer.load(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(tmp_path).chat_template == "J"


def test_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: "):
        Tokenizer.load(tmp_path)
