"""Why does a classifier see a digit, does the explanation tell the truth, and which neurons does it need?

A small convolutional network learns scikit-learn's 8x8 digits. Several attributions explain its logits for test digits
and are checked: integrated gradients by their completeness residual, all by deletion and insertion against random
orders (95% intervals over digits) and by randomising the weights layer by layer. Then its hidden neurons are ranked,
described, and ablated against as many random ones. Draws three pictures if matplotlib is installed.
Run: python examples/explain_digits.py   (about a minute on two cores; needs scikit-learn)
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, gradient_algorithm, train
from jaxalign.interop.images import load_images
from jaxalign.interpretability.attribution import (
    completeness_residual,
    expected_gradients,
    gradient_times_input,
    input_gradient,
    integrated_gradients,
    occlusion,
    smooth_grad,
)
from jaxalign.interpretability.attribution_faithfulness import attribution_faithfulness, cascading_randomization
from jaxalign.interpretability.grad_cam import grad_cam
from jaxalign.interpretability.neuron_ablation import ablation_effect
from jaxalign.interpretability.neurons import describe_neuron, important_neurons, neuron_sentence
from jaxalign.interpretability.shapley import shapley_sampling
from jaxalign.networks import ConvNet
from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.runtime import estimate

STEPS, EXPLAINED, LAYERS = 1000, 64, ("MLP_0/Dense_1", "MLP_0/Dense_0", "Conv_1", "Conv_0")
SITES, COUNTS, NAMES = ("conv_post_1", "post_0"), (1, 2, 4, 8, 12), [f"digit {digit}" for digit in range(10)]
KEY = jax.random.key(0)

digits = load_images("digits")
x_train, y_train, x_test, y_test = (jnp.asarray(part) for part in digits[:4])
network = Network.from_linen(ConvNet(10, channels=(8, 16), hidden_sizes=(32,)), x_test[:1])
x, y = x_test[:EXPLAINED], y_test[:EXPLAINED]


@jax.jit
def learned():
    def objective(params, batch, key):
        return cross_entropy(network.apply(params, batch[0]), batch[1]).mean(), {}

    algorithm = gradient_algorithm(network, objective, optax.adam(3e-3))

    def step(state, key):
        rows = jax.random.randint(key, (64,), 0, len(y_train))
        return algorithm.step(state, (x_train[rows], y_train[rows]))

    init_key, batch_key = jax.random.split(KEY)
    return train(Algorithm(algorithm.init, step), init_key, jax.random.split(batch_key, STEPS))[0].params


def label_logit(params, labels, x):
    """The label's logit less the mean logit: what speaks for this class and not for all."""
    logits = network.apply(params, x)
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0] - jnp.mean(logits, axis=1)


@jax.jit
def explained(params):
    """By method, what each pixel of the digits contributes, [N, 8, 8, 1]; a missing pixel is black."""
    fn = functools.partial(label_logit, params, y)
    return {
        "gradient x input": gradient_times_input(fn, x),
        "SmoothGrad x input": x * smooth_grad(KEY, fn, x, sigma=0.2),
        "integrated gradients": integrated_gradients(fn, x, 0.0, steps=64),
        "expected gradients": expected_gradients(KEY, fn, x, x_train, samples=200),
        "occlusion 2x2": occlusion(fn, x, (2, 2)),
        "Shapley, 64 orders": shapley_sampling(KEY, fn, x, 0.0).value.reshape(x.shape),
        "Grad-CAM": grad_cam(fn, x, "conv_post_0", size=x.shape[1:3])[..., None],
    }


def checked(params, attributions):
    """Prints what the checks say of the attributions; returns faithfulness by method."""
    fn = jax.jit(functools.partial(label_logit, params, y))
    residual = completeness_residual(fn, x, 0.0, attributions["integrated gradients"])
    whole = jnp.mean(jnp.abs(fn(x) - fn(jnp.zeros_like(x))))
    print(f"integrated gradients leave {jnp.abs(residual).mean():.3f} of {whole:.1f} unexplained (mean, logits)\n")

    print(f"{'gain over random orders, logits':32}{'deletion':>28}{'insertion':>28}")
    check = jax.jit(lambda scores: attribution_faithfulness(KEY, fn, x, scores, 0.0))
    checks = {name: check(scores) for name, scores in attributions.items()}
    for name, found in checks.items():
        gains = (estimate(*gain) for gain in (found.deletion_gain, found.insertion_gain))
        print(f"{name:32}" + "".join(f"{gain:>28}" for gain in gains))

    print("\nrank correlation of |attribution| with that of weights randomised from the output down:")
    for name, method in (("gradient", input_gradient), ("gradient x input", gradient_times_input)):
        cascade = jax.jit(
            lambda params, method=method: cascading_randomization(
                KEY, network, params, lambda params: method(functools.partial(label_logit, params, y), x), LAYERS
            )
        )
        rows = zip(("none", *LAYERS), cascade(params), strict=True)
        print(f"  {name:18}" + ", ".join(f"{layer} {row.mean():.2f}" for layer, row in rows))
    print("  (the input itself is in the second: black pixels stay black whatever the weights)")
    return checks


def ablated(params):
    """Prints the most important neurons of two layers; returns the effect of ablating them by layer."""
    apply = functools.partial(network.apply, params)
    fn = functools.partial(label_logit, params, y_train)
    rankings = jax.jit(lambda x: important_neurons(fn, x, SITES))(x_train)
    describe = jax.jit(
        lambda site, n: describe_neuron(apply, x_test, y_test, site, n, num_classes=10), static_argnums=0
    )
    ablate = jax.jit(
        lambda site, order: ablation_effect(KEY, apply, x_test, y_test, site, order, COUNTS), static_argnums=0
    )
    effects = {}
    for site, ranking in rankings.items():
        print(f"\n{site}, its most important neurons among training digits, as test digits show them:")
        for n in ranking.order[:3]:
            print("  " + neuron_sentence(describe(site, n), name=f"neuron {n}", classes=NAMES))
        effects[site] = effect = ablate(site, ranking.order)
        print("  accuracy without the top n, without n random ones, how much more is lost (points), p over sets:")
        for i, count in enumerate(effect.counts):
            excess, p = estimate(*(100 * effect.accuracy_excess[i])), effect.p_value[i]
            print(f"    n = {count:2}: {effect.accuracy[i]:.1%}, {effect.random_accuracy[i]:.1%}, {excess}, {p:.2f}")
    return effects


if __name__ == "__main__":
    params = learned()
    right = jnp.mean(jnp.argmax(network.apply(params, x_test), axis=1) == y_test)
    print(f"right about {right:.1%} of {len(y_test)} test digits; {EXPLAINED} of them are explained\n")
    attributions = explained(params)
    checks = checked(params, attributions)
    effects = ablated(params)
    if importlib.util.find_spec("matplotlib"):
        from jaxalign.runtime.attribution_figures import ablation_figure, attribution_grid, faithfulness_figure

        shown = {name: scores[:10] for name, scores in attributions.items()}
        attribution_grid(x[:10], shown, titles=[NAMES[digit] for digit in y[:10]]).savefig("attributions.png", dpi=150)
        faithfulness_figure(checks, unit="logit").savefig("faithfulness.png", dpi=150)
        ablation_figure(effects).savefig("ablation.png", dpi=150)
        print("\nwrote attributions.png, faithfulness.png and ablation.png")
    else:
        print('\nno pictures: pip install "jaxalign[viz]"')
