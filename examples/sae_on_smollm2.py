"""Sparse autoencoders on SmolLM2: three sparsities in one program, what they cost the model, what features fire on.

The model's 15th layer reads Python's own language reference; the activations are kept in runs/sae_on_smollm2, so a
second run begins where they end. `jaxalign sae` does the same with checkpoints, a report and a dashboard.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import train
from jaxalign.interop import load_pretrained
from jaxalign.interop.activation_store import collect_activations
from jaxalign.interop.text_tokens import pack_tokens, python_documentation
from jaxalign.interpretability.feature_examples import merge_top, no_examples
from jaxalign.interpretability.sae_config import SAEConfig
from jaxalign.interpretability.sae_features import sae_decode, sae_encode
from jaxalign.interpretability.sae_metrics import sae_metrics
from jaxalign.interpretability.sae_parameters import fold_input_scale
from jaxalign.interpretability.sparse_autoencoder import sparse_autoencoder
from jaxalign.interpretability.splice import loss_recovered
from jaxalign.runtime import estimate

TOKENS, STEPS, FEATURES, ROWS = 32_768, 300, 1024, 8
KS = jnp.array([16, 32, 64])
SITE, LENGTH, SKIP = "resid_post[15]", 128, 4

model = load_pretrained("smollm2-135m")
packed = pack_tokens(python_documentation(), model.tokenizer, length=LENGTH, limit=TOKENS)
folder = "runs/sae_on_smollm2"
store = collect_activations(folder, model.network, model.params, packed.tokens, sites=(SITE,), skip=SKIP)
x = store.read(np.arange(len(store)))
count = len(x) * 9 // 10  # to learn from
scale = math.sqrt(x.shape[1]) / float(np.linalg.norm(x, axis=1).mean())
batch = store.batches(batch_size=512, seed=0, among=np.arange(count))
batches = scale * np.stack([batch(step) for step in range(STEPS)])


def config_of(k):
    return SAEConfig(d_in=x.shape[1], d_sae=FEATURES, activation="topk", k=k)


def run(k, batches):
    """Parameters trained with this k, acting on activations as they are."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(3e-3, 0.0, STEPS)))
    algorithm = sparse_autoencoder(config_of(k), optimizer, b_dec=scale * x.mean(axis=0))
    state, _ = train(algorithm, jax.random.key(0), batches)
    return fold_input_scale(state.params, scale, config_of(k))


@jax.jit
def evaluate(params, k, held_out, model_params):
    config = config_of(k)
    features = sae_encode(params, held_out, config)
    rows = packed.tokens[-ROWS:]
    losses = loss_recovered(model.network, model_params, rows, SITE, params, config, keep_first=SKIP)
    return sae_metrics(held_out, sae_decode(params, features, config), features), losses


all_params = jax.jit(lambda ks, batches: jax.lax.map(lambda k: run(k, batches), ks))(KS, batches)
print("L0     explained variance  loss recovered")
for i, k in enumerate(KS):
    params = jax.tree.map(lambda leaf, i=i: leaf[i], all_params)
    metrics, losses = evaluate(params, k, x[count:], model.params)
    recovered = estimate(losses.recovered, *losses.interval(jax.random.key(1)))
    print(f"{float(metrics['l0']):<5.1f}  {float(metrics['explained_variance']):<18.3f}  {recovered}")

features = jax.jit(lambda params, x: sae_encode(params, x, config_of(KS[-1])))(params, x)
top = merge_top(no_examples(FEATURES, 5), features, np.arange(len(x)))
tokens = packed.tokens.ravel()
print("\nWhat the features that fire most strongly fire on:")
for feature in np.argsort(-np.asarray(top.value[:, 0]))[:8]:
    places = store.place[np.asarray(top.index[feature])]
    print(f"{feature:5d}  " + " | ".join(repr(model.tokenizer.decode(tokens[at - 3 : at + 1])) for at in places))
