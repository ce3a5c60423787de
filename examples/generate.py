"""Eight draws from SmolLM2-135M for each of two prompts, in one batch, with the log-probabilities a trainer needs."""

import jax
import numpy as np

from jaxalign.interop import load_pretrained
from jaxalign.rlhf import generate

MODEL, SAMPLES, NEW = "smollm2-135m", 8, 24
QUESTIONS = ("Why is the sky blue?", "Name a colour that rhymes with 'bed'.")

model = load_pretrained(MODEL, remat="none")
render = model.tokenizer.render
texts = [render([{"role": "user", "content": question}], add_generation_prompt=True) for question in QUESTIONS]
rows = [model.tokenizer.encode(text) for text in texts]
lengths = np.array([len(row) for row in rows])
prompts = np.array([row + [0] * (lengths.max() - len(row)) for row in rows])


@jax.jit
def draw(key, params, prompts, lengths, temperature):
    return generate(
        key, model.network, params, prompts, lengths, max_new_tokens=NEW, temperature=temperature, top_p=0.95,
        stop_ids=(model.tokenizer.eos_id,), samples=SAMPLES,
    )  # fmt: skip


for temperature in (0.3, 1.0):  # one compiled program for both
    out = draw(jax.random.key(0), model.params, prompts, lengths, temperature)
    print(f"temperature {temperature}")
    for row in range(len(out.tokens)):
        tokens, log_probs = (np.asarray(x[row])[np.asarray(out.mask[row])] for x in (out.tokens, out.log_probs))
        print(f"  {log_probs.sum():7.1f} nats  {model.tokenizer.decode(tokens)!r}")
