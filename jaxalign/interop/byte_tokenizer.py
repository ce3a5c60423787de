"""A tokenizer that needs no file, and the plain rendering of dialogues for tokenizers without a chat template."""

from collections.abc import Iterable, Mapping, Sequence


def plain_dialogue(messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
    """Messages as lines "role: content"; with `add_generation_prompt` the text ends on an open "assistant:" line.

    The open line has no space after its colon, so that the reply's first token is a word with its leading space,
    as byte-pair vocabularies have it, and the prompt's tokens stay a prefix of the whole dialogue's.
    """
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join([*lines, "assistant:"] if add_generation_prompt else lines)


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8 text; 256, 257 and 258 are begin, end and padding, and have no text form.

    No text can therefore smuggle in a special token. It has no chat template: `render` is `plain_dialogue`.
    """

    bos_id: int | None = 256
    eos_id: int = 257
    pad_id: int = 258
    vocab_size: int = 259
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`; neither begin nor end is added. Raises UnicodeEncodeError on a lone surrogate."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the byte ids, special ids left out; bytes that are not UTF-8 show as U+FFFD.

        Raises ValueError on an id outside the vocabulary.
        """
        ids = [int(token) for token in tokens]
        if unknown := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ByteTokenizer.decode: token {unknown[0]} is not in 0..{self.vocab_size - 1}")
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
        """`plain_dialogue(messages)`."""
        return plain_dialogue(messages, add_generation_prompt=add_generation_prompt)
