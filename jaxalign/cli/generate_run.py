"""What `jaxalign generate` does with one prompt and in a chat: read, stream the answer, remember."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxalign.cli.generate import Generate
from jaxalign.interop import Pretrained, load_pretrained
from jaxalign.interop.byte_tokenizer import plain_dialogue
from jaxalign.rlhf.generation import Completions, continue_text

READ, WRITE = 64, 4  # tokens read, and tokens written, by one call of a compiled program


def run(options: Generate, console: Console) -> None:
    """Complete a file, answer one prompt, or chat."""
    check(options)
    console.print(f"Loading {options.model} ...", highlight=False)
    pretrained = load_pretrained(options.model, param_dtype=options.dtype, dtype=options.dtype, remat="none")
    if pretrained.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.json, without which text cannot be read")
    if options.file is not None:
        from jaxalign.cli.generate_file import complete_file

        complete_file(options, pretrained, console)
    elif options.prompt is not None:
        messages = [{"role": "user", "content": options.prompt}]
        speaker = Speaker(options, pretrained)
        _say(speaker, tokens_of(options, pretrained, messages), console, turn=0)
        console.print(speaker.speed(), style="dim", highlight=False)
    else:
        chat(options, pretrained, console)


def check(options: Generate) -> None:
    """Options that cannot go together, or are out of range; generation itself checks temperature and filters."""
    for name in ("max_new_tokens", "samples", "batch_size", "context"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if options.file is not None and options.prompt is not None:
        raise ValueError("give a prompt or --file, not both")
    if options.file is None and (options.out is not None or options.samples != 1):
        raise ValueError("--out and --samples go with --file")
    if options.raw and options.prompt is None and options.file is None:
        raise ValueError("--raw continues a text: give one, or --file")
    if options.raw and options.system is not None:
        raise ValueError("--raw has no place for a --system message")
    if not options.temperature > 0:
        raise ValueError(f"--temperature must be above 0, got {options.temperature}; its limit at 0 is --greedy")


def tokens_of(options: Generate, pretrained: Pretrained, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, opened for the model's turn; with --raw those of its text alone."""
    tokenizer = pretrained.tokenizer
    assert tokenizer is not None
    if options.raw:
        return tokenizer.encode("".join(message["content"] for message in messages), add_special_tokens=True)
    if options.system is not None:
        messages = [{"role": "system", "content": options.system}, *messages]
    render = plain_dialogue if tokenizer.chat_template is None else tokenizer.render
    return tokenizer.encode(render(messages, add_generation_prompt=True))


def sampling_of(options: Generate) -> dict[str, Any]:
    """The keyword arguments of `generate` that say how to draw."""
    names = ("temperature", "top_k", "top_p", "min_p")
    return {} if options.greedy else {name: getattr(options, name) for name in names}


class TextStream:
    """Text that appears token by token: `push` returns what is certain to stay, `flush` the rest.

    A character of several bytes can be spread over tokens; until its last byte is there it decodes to U+FFFD.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode, self.tokens, self.shown = decode, list[int](), ""

    def push(self, tokens: list[int]) -> str:
        """Take in more tokens; return the new text that no later token can change."""
        self.tokens += tokens
        return self._new(self.decode(self.tokens).rstrip("\ufffd"))

    def flush(self) -> str:
        """What was held back, broken characters included."""
        return self._new(self.decode(self.tokens))

    def _new(self, text: str) -> str:
        new = text[len(self.shown) :]
        self.shown += new
        return new


class Speaker:
    """A model with the cache of one conversation: what it has read already is not read again."""

    def __init__(self, options: Generate, pretrained: Pretrained) -> None:
        self.options, self.network = options, pretrained.network
        self.params = jax.jit(self.network.for_decoding)(pretrained.params)
        self.decode_text = pretrained.tokenizer.decode
        self.stop_ids = tuple(i for i in (pretrained.tokenizer.eos_id,) if i is not None)
        self.context = min(options.context, pretrained.config.max_length)
        self.forget()
        self.count, self.seconds = 0, 0.0

        def read(params: Any, tokens: Any, cache: Any, length: Any) -> Any:
            return self.network.decode(params, tokens, cache)[1]._replace(length=length)

        def write(key: Any, params: Any, last: Any, cache: Any) -> tuple[Completions, Any]:
            return continue_text(
                None if options.greedy else key, self.network, params, last, cache, max_new_tokens=WRITE,
                stop_ids=self.stop_ids, **sampling_of(options),
            )  # fmt: skip

        self.read, self.write = jax.jit(read, donate_argnums=2), jax.jit(write, donate_argnums=3)

    def forget(self) -> None:
        """An empty cache; the last call of either program may write up to its width beyond the context."""
        self.cache = self.network.init_cache(1, self.context + max(READ, WRITE))
        self.held: list[int] = []

    def answer(self, tokens: list[int], turn: int) -> Iterator[list[int]]:
        """Read what the cache does not hold yet, then yield new tokens in small groups, the stop token left out."""
        budget = min(self.options.max_new_tokens, self.context - len(tokens))
        if budget < 1:
            raise ValueError(
                f"the conversation is {len(tokens)} tokens long and the context {self.context}: nothing is left to "
                "answer in (--context makes it longer, up to the model's own)"
            )
        try:
            self._read(tokens)
            yield from self._write(tokens[-1], budget, jax.random.fold_in(jax.random.key(self.options.seed), turn))
        except BaseException:
            # The programs reuse the cache's memory: after an interruption it may be gone.
            self.forget()
            raise

    def _read(self, tokens: list[int]) -> None:
        same = 0
        while same < min(len(self.held), len(tokens) - 1) and self.held[same] == tokens[same]:
            same += 1
        for start in range(same, len(tokens) - 1, READ):
            part = tokens[start : min(start + READ, len(tokens) - 1)]
            padded = jnp.asarray([part + [0] * (READ - len(part))], jnp.int32)
            self.cache = self.cache._replace(length=jnp.full(1, start, jnp.int32))
            self.cache = self.read(self.params, padded, self.cache, jnp.full(1, start + len(part), jnp.int32))
        self.cache = self.cache._replace(length=jnp.full(1, len(tokens) - 1, jnp.int32))
        self.held = tokens[:-1]

    def _write(self, last: int, budget: int, key: Any) -> Iterator[list[int]]:
        for group in range(-(-budget // WRITE)):
            began = time.perf_counter()
            written, self.cache = self.write(
                jax.random.fold_in(key, group), self.params, jnp.asarray([last], jnp.int32), self.cache
            )
            new = np.asarray(written.tokens)[np.asarray(written.mask)].tolist()
            if group or self.count:  # the first call compiles
                self.count, self.seconds = self.count + len(new), self.seconds + time.perf_counter() - began
            self.held += [last, *new[:-1]]
            last = new[-1]
            ended = bool(written.ended[0])
            new = new[: budget - group * WRITE]
            yield new[:-1] if ended and new[-1] in self.stop_ids else new
            if ended:
                return

    def speed(self) -> str:
        """Tokens per second so far."""
        if not self.seconds:
            return "(too short to time)"
        return f"({self.count} tokens timed, {self.count / self.seconds:.1f} a second)"


def _say(speaker: Speaker, tokens: list[int], console: Console, turn: int) -> str:
    """Stream an answer to the terminal and return its text; Ctrl-C ends the answer only."""
    stream = TextStream(speaker.decode_text)
    try:
        for new in speaker.answer(tokens, turn):
            _show(console, stream.push(new))
    except KeyboardInterrupt:
        pass
    _show(console, stream.flush() + "\n")
    return stream.shown


def _show(console: Console, text: str) -> None:
    console.file.write(text)
    console.file.flush()


def chat(options: Generate, pretrained: Pretrained, console: Console) -> None:
    """Turn by turn until an empty line, Ctrl-D or Ctrl-C at the prompt."""
    speaker = Speaker(options, pretrained)
    messages: list[dict[str, str]] = []
    console.print("Say something. An empty line ends the chat, Ctrl-C an answer.", style="dim")
    turn = 0
    while True:
        try:
            said = input("> ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            break
        if not said.strip():
            break
        messages.append({"role": "user", "content": said})
        tokens = tokens_of(options, pretrained, messages)
        forgotten = 0
        while len(messages) > 1 and len(tokens) + options.max_new_tokens > speaker.context:
            messages, forgotten = messages[2:], forgotten + 1
            tokens = tokens_of(options, pretrained, messages)
        if forgotten:
            console.print(f"(the context is full: {forgotten} earlier exchanges are forgotten)", style="dim")
        try:
            answer = _say(speaker, tokens, console, turn)
        except ValueError as error:
            console.print(f"({error})", style="dim", highlight=False)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
        turn += 1
    console.print(speaker.speed(), style="dim", highlight=False)
