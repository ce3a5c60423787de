"""Text to token ids and back, and chat messages to text, on the `tokenizers` library alone."""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxalign.interop.extras import lm_extra

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


class Tokenizer:
    """A byte-pair tokenizer with its special tokens and chat template.

    backend: a `tokenizers.Tokenizer`; its padding and truncation settings are switched off
    bos_token, eos_token, pad_token: their text, or None; each must be in the vocabulary
    chat_template: Jinja source, or None
    settings: further entries of tokenizer_config.json, kept for `save`
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        backend.no_padding()
        backend.no_truncation()
        self.bos_token, self.eos_token, self.pad_token = bos_token, eos_token, pad_token
        self.chat_template = chat_template
        self.settings = dict(settings or {})
        for role, token in (("bos", bos_token), ("eos", eos_token), ("pad", pad_token)):
            if token is not None and backend.token_to_id(token) is None:
                raise ValueError(f"Tokenizer: the {role} token {token!r} is not in the vocabulary")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, and tokenizer_config.json and chat_template.jinja where they exist.

        Raises FileNotFoundError without a tokenizer.json.
        """
        tokenizers = lm_extra("tokenizers")
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; other tokenizer files are not read: let transformers' AutoTokenizer save one"
            )
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else {}
        template = settings.pop("chat_template", None)
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / TEMPLATE).is_file():
            template = (folder / TEMPLATE).read_text(encoding="utf-8")
        specials = {f"{role}_token": _text(settings.pop(f"{role}_token", None)) for role in ("bos", "eos", "pad")}
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file}: {error}") from error
        return cls(backend, **specials, chat_template=template, settings=settings)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this; a model may round its own vocabulary up."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that opens a sequence, or None."""
        return self._id(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a sequence (a turn, for chat models), or None."""
        return self._id(self.eos_token)

    @property
    def pad_id(self) -> int | None:
        """Id to fill rows with; that of `eos_id` where the tokenizer has none of its own."""
        return self.eos_id if self.pad_token is None else self._id(self.pad_token)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. A special token written out in it becomes its one id, as chat templates rely on.

        add_special_tokens: also put what the tokenizer puts around a text (often bos). Leave it off for rendered chat.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` for each text, in parallel; rows differ in length."""
        return [one.ids for one in self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids [T] (any integer sequence or array)."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **extra: Any
    ) -> str:
        """Chat messages [{"role": ..., "content": ...}, ...] as the text the model was trained on.

        add_generation_prompt: end with the opening of an assistant turn.
        extra: further variables of the template (`tools`, say).
        Raises ValueError if there is no template, a message lacks a role, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("Tokenizer.render: this tokenizer has no chat template; set `chat_template`")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"Tokenizer.render: message {number} is not a mapping with 'role' and 'content'")
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        tokens = {name: token or "" for name, token in tokens.items()}
        template = _compile(self.chat_template)
        try:
            return template.render(
                **{**tokens, **extra}, messages=list(messages), add_generation_prompt=add_generation_prompt
            )
        except lm_extra("jinja2").exceptions.TemplateError as error:
            raise ValueError(f"Tokenizer.render: the chat template refused the messages: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings = {**settings, **self.settings, **tokens}
        (folder / CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / TEMPLATE).write_text(self.chat_template, encoding="utf-8")


def _text(token: Any) -> str | None:
    """A special token of tokenizer_config.json: a string, or a mapping with its text under "content"."""
    return token["content"] if isinstance(token, Mapping) else token


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    """A chat template, sandboxed, with the names and whitespace rules that published templates assume."""
    lm_extra("jinja2")
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote; the text is unchanged."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes HTML, which no model saw in training.
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
