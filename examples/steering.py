"""Where does SmolLM2-135M keep "that was good", and does adding it change what the model says?

Three looks at one direction of the residual stream. A linear probe reads a sentence's mood from some layers, beside
a probe of shuffled labels. The logit lens shows at which layer the next word is decided. A steering vector, the mean
difference of eight pairs of sentences, is added while the model goes on from sixteen other prompts: the log odds of
praise against blame must follow its scale, with a random vector of the same length as the control.
Run: python examples/steering.py       (a minute on two cores; the model comes from PyPI, once)
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.interop import load_pretrained
from jaxalign.interpretability.activations import capture
from jaxalign.interpretability.logit_lens import logit_lens
from jaxalign.interpretability.probing import linear_probe
from jaxalign.interpretability.steering import steer, steering_vector
from jaxalign.rlhf import greedy
from jaxalign.statistics import bootstrap_interval

LAYER, SCALES, NEW = 12, (-3.0, -1.5, 0.0, 1.5, 3.0), 12
THINGS = ("film", "meal", "book", "trip", "song", "hotel", "game", "talk", "lesson", "garden", "play", "party")
PRAISE = ("wonderful", "excellent", "great", "lovely", "amazing", "good")
BLAME = ("terrible", "awful", "horrible", "dreadful", "bad", "poor")
SPEAKERS, SUBJECTS = ("My brother", "Our teacher", "The guest", "Her friend"), ("soup", "view", "show", "coat")
PROMPTS = tuple(f"{who} said that the {what} was" for who, what in itertools.product(SPEAKERS, SUBJECTS))

model = load_pretrained("smollm2-135m", remat="none")
network, params = model.network, model.params


def tokens_of(texts):
    """Rows padded on the right [B, T], and where each ends."""
    rows = model.tokenizer.encode_batch(list(texts))
    lengths = np.array([len(row) for row in rows])
    return np.array([row + [0] * (lengths.max() - len(row)) for row in rows]), lengths


def last(lengths, width):
    return np.arange(width)[None] == lengths[:, None] - 1


def interval(scores):
    low, high = bootstrap_interval(jax.random.key(0), scores)
    return f"{float(np.mean(scores)):+6.2f} [{float(low):+.2f}, {float(high):+.2f}]"


# 1. What each layer knows: the mood, read at the full stop. (The held-out sentences have words of the training ones.)
sentences = [
    (f"I thought the {what} was {word}.", label)
    for (label, words), what in itertools.product(enumerate((BLAME, PRAISE)), THINGS)
    for word in words
]
moods = np.array([label for _, label in sentences])
tokens, lengths = tokens_of(text for text, _ in sentences)
_, values = jax.jit(capture(network, ("resid_post",)).apply)(params, tokens)
at_end = values["resid_post"][::6, np.arange(len(tokens)), lengths - 1]
found = jax.jit(jax.vmap(lambda x: linear_probe(jax.random.key(1), x, moods, num_classes=2)))(at_end)
print("layer   probe's accuracy     shuffled labels")
for i, (accuracy, low, high) in enumerate(zip(found.accuracy, found.low, found.high, strict=True)):
    print(f"{6 * i:5d}   {accuracy:.2f} [{low:.2f}, {high:.2f}]   {found.control[i]:.2f}")

# 2. When the next word is decided.
prompt, _ = tokens_of(["The capital of France is"])
lens = jax.jit(lambda: logit_lens(network, params, prompt, read=lambda logits: jax.lax.top_k(logits[0, -1], 1)[1]))()
print("\nafter layer  the model would say")
for layer in (4, 9, 14, 19, 24, 27, 29):
    print(f"{layer:11d}  {model.tokenizer.decode([int(lens[layer, 0])])!r}")

# 3. Pushing.
site = f"resid_post[{LAYER}]"
pairs = list(zip(PRAISE, BLAME, strict=True))[:4]
(good, good_lengths), (bad, bad_lengths) = (
    tokens_of(f"I thought the {what} was {pair[side]}." for pair in pairs for what in THINGS[:2]) for side in (0, 1)
)
vector = steering_vector(
    network, params, good, bad, site=site,
    positive_mask=last(good_lengths, good.shape[1]), negative_mask=last(bad_lengths, bad.shape[1]),
)  # fmt: skip
noise = jax.random.normal(jax.random.key(2), vector.shape)
noise = noise * jnp.linalg.norm(vector) / jnp.linalg.norm(noise)
prompts, lengths = tokens_of(PROMPTS)
praise, blame = (np.array([model.tokenizer.encode(" " + word)[0] for word in words]) for words in (PRAISE, BLAME))


@jax.jit
def log_odds(vector, scale):
    """log P(a word of praise) - log P(a word of blame) as the next token of each prompt, in nats."""
    logits = steer(network, site, vector, scale, keep_first=1).apply(params, prompts)
    logits = logits[np.arange(len(prompts)), lengths - 1]
    return jax.nn.logsumexp(logits[:, praise], axis=-1) - jax.nn.logsumexp(logits[:, blame], axis=-1)


@jax.jit
def spoken(scale):
    steered = steer(network, site, vector, scale)
    return greedy(steered, params, prompts[:1], lengths[:1], max_new_tokens=NEW).tokens[0, lengths[0] :]


print("\nscale   praise over blame, nats    with a random vector   and the model goes on")
for scale in SCALES:
    text = model.tokenizer.decode(spoken(scale))
    print(f"{scale:+5.1f}   {interval(log_odds(vector, scale))}   {interval(log_odds(noise, scale))}   {text!r}")
