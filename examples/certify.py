"""How far can an input move before the answer may change? Proven, for a function that no library has seen.

The function is written out below: a layer norm, attention over five tokens, a GELU, three classes. It is first trained
on a toy task (which of three kinds of token is the commonest, seen through noise), then bounded over a box around each
input: by intervals, which are loose here, and by CROWN's lines, which are not. PGD says how far from the truth they
are. Run: python examples/certify.py   (about a minute on two cores, nearly all of it compilation)
"""

import jax
import jax.numpy as jnp
import optax

from jaxalign.certification.crown import crown_bounds
from jaxalign.certification.interval import interval_bounds
from jaxalign.certification.margins import certified_radius, margin_lower_bounds
from jaxalign.robustness import cross_entropy, pgd

TOKENS, WIDTH, CLASSES, STEPS, EPSILON, MOST = 5, 4, 3, 300, 0.01, 0.2


def logits(params, tokens):
    """tokens [TOKENS, WIDTH] -> [CLASSES]; nothing in it knows of bounds."""
    centred = tokens - tokens.mean(axis=1, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred**2).mean(axis=1, keepdims=True) + 0.1)
    query, key, value = (normal @ params[name] for name in ("query", "key", "value"))
    attention = jax.nn.softmax(query @ key.T / jnp.sqrt(WIDTH), axis=1)
    return jax.nn.gelu((attention @ value).mean(axis=0)) @ params["out"]


def draw(key, count):
    """Tokens [count, TOKENS, WIDTH] and the commonest kind [count]."""
    kind_key, noise_key = jax.random.split(key)
    kinds = jax.random.randint(kind_key, (count, TOKENS), 0, CLASSES)
    codes = jax.random.normal(jax.random.key(9), (CLASSES, WIDTH))
    x = codes[kinds] + 0.1 * jax.random.normal(noise_key, (count, TOKENS, WIDTH))
    return x, jax.nn.one_hot(kinds, CLASSES).sum(axis=1).argmax(axis=1)


def loss(params, key):
    x, y = draw(key, 128)
    return cross_entropy(jax.vmap(logits, (None, 0))(params, x), y).mean()


@jax.jit
def trained(key):
    init_key, data_key = jax.random.split(key)
    shapes = {"query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "out": (WIDTH, CLASSES)}
    keys = jax.random.split(init_key, len(shapes))
    params = {name: 0.4 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    optimizer = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(data_key, STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


if __name__ == "__main__":
    params = trained(jax.random.key(0))
    classify = jax.jit(lambda x: jax.vmap(lambda tokens: logits(params, tokens))(x))
    x, y = draw(jax.random.key(1), 16)
    print(f"{float((classify(x).argmax(axis=1) == y).mean()):.0%} of {len(y)} inputs are classified right")

    one = lambda tokens: logits(params, tokens)  # noqa: E731
    for name, bound in (("intervals", interval_bounds), ("CROWN", crown_bounds)):
        found = jax.jit(lambda lower, upper, bound=bound: bound(one, lower, upper))(x[0] - EPSILON, x[0] + EPSILON)
        sides = zip(found.lower.tolist(), found.upper.tolist(), strict=True)
        print(f"{name:9} the logits lie in " + ", ".join(f"[{low:.2f}, {high:.2f}]" for low, high in sides))

    margins = margin_lower_bounds(classify, x, y, EPSILON, method="crown-interval", bounds=None)
    sure = (margins > 0).all(axis=1)
    print(f"No change of every number by up to {EPSILON} alters the answer of {int(sure.sum())} inputs: proven")
    radius = certified_radius(classify, x, y, method="crown-interval", maximum=MOST, bounds=None, steps=7)
    print(f"Proven up to a radius of {float(jnp.median(radius[radius >= 0])):.3f} at the median input")
    for epsilon in (EPSILON, MOST):
        broken = pgd(jax.random.key(2), classify, x, y, epsilon, bounds=None).success
        print(
            f"PGD at {epsilon}: {int(broken.sum())} inputs fall, {int((broken & (radius >= epsilon)).sum())} certified"
        )
