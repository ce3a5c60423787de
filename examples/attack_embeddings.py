"""How little must a prompt's embeddings move before SmolLM2-135M begins its answer as an attacker wants?

The image attacks take any function: here from what the embedding layer gives, [B, T, D], to the logits of the next
token, without a box, in balls of the Frobenius norm. Only the tokens of the user's own question may move.
Run: python examples/attack_embeddings.py   (a minute on two cores; the model comes from PyPI)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.interop import load_pretrained
from jaxalign.networks import transformer
from jaxalign.robustness import pgd

MODEL, STEPS = "smollm2-135m", 20
QUESTION, WANTED = "What is the capital of France?", "No"
epsilons = np.array([0.0, 0.05, 0.1, 0.2, 0.4, 0.8], np.float32)

model = load_pretrained(MODEL, remat="none")
text = model.tokenizer.render([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
tokens = model.tokenizer.encode(text)
begin = len(model.tokenizer.encode(text[: text.index(QUESTION)]))
movable = (np.arange(len(tokens)) >= begin) & (np.arange(len(tokens)) < begin + len(model.tokenizer.encode(QUESTION)))
embeddings = model.params["embedding"][jnp.array(tokens)]  # [T, D]
unembedding = model.network.unembedding(model.params)
prompt_model = transformer(dataclasses.replace(model.config, vocab_size=len(tokens)))  # token t of T is row t


def next_token_logits(rows):
    """[B, T, D] -> [B, V]: each row of the batch stands in for the embedding table."""

    def one(row):
        row = jnp.where(movable[:, None], row, embeddings)
        hidden = prompt_model.hidden(model.params | {"embedding": row}, jnp.arange(len(tokens))[None])
        return unembedding @ hidden[0, -1]

    return jax.vmap(one)(rows)


rows = jnp.repeat(embeddings[None], len(epsilons), axis=0)  # one row of the batch for each epsilon
wanted = jnp.full(len(epsilons), model.tokenizer.encode(WANTED)[0])
result = pgd(
    jax.random.key(0), next_token_logits, rows, wanted, epsilons,
    norm="l2", steps=STEPS, targeted=True, bounds=None, random_start=False,
)  # fmt: skip
probabilities = jax.nn.softmax(jax.jit(next_token_logits)(result.x_adv))
print(f"{QUESTION} The movable embeddings have norm {jnp.linalg.norm(embeddings[movable]):.2f}; wanted: {WANTED!r}")
for epsilon, p, success in zip(epsilons, probabilities, result.success, strict=True):
    token = int(jnp.argmax(p))
    print(
        f"epsilon {epsilon:.2f}: begins with {model.tokenizer.decode([token])!r} ({p[token]:.2f}), "
        f"P({WANTED}) = {p[wanted[0]]:.4f}{', reached' if success else ''}"
    )
