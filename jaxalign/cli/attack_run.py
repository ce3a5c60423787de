"""What `jaxalign attack` does: load or train a classifier, run every attack at every epsilon, report."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxalign.cli.attack import Attack
from jaxalign.cli.attack_report import write_report
from jaxalign.cli.classifiers import Classifier, Description, load_classifier, network_of, save_classifier
from jaxalign.cli.named_attacks import KeptAttacks, evaluate, named_attacks
from jaxalign.cli.ppo_run import use_all_cores
from jaxalign.cli.robust_train import RobustTrain
from jaxalign.cli.robust_train_run import attacked, drawn_for_test, train
from jaxalign.interop.images import DIGITS, Images, load_images
from jaxalign.types import Params

PLAIN_STEPS = 500


def run(options: Attack, console: Console) -> dict[str, Any]:
    """The whole job; returns what was measured."""
    check(options)
    if not options.resume and (options.out / "attacks").exists():
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    attacks = named_attacks(
        options.attacks, norm=options.norm, console=console, steps=options.steps, restarts=options.restarts
    )
    use_all_cores()
    images, description, params, about = _model(options, console)
    classifier = Classifier(network_of(description), jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), params))
    x, y = drawn_for_test(images, options.examples, options.seed)
    console.print(f"Attacking {len(y)} of {len(images.y_test):,} test images of {images.name}")
    key, kept, epsilons = jax.random.key(options.seed), KeptAttacks(options.out / "attacks"), sorted(options.epsilons)
    evaluation = evaluate(
        key, classifier, x, y, attacks, epsilons, kept=kept, batch_size=options.batch_size, console=console
    )
    middle = epsilons[len(epsilons) // 2]
    record = attacked(key, classifier, x, y, evaluation, kept.found(x), middle, norm=options.norm)
    report, results = write_report(options, about, record)
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def _model(options: Attack, console: Console) -> tuple[Images, Description, Params, list[str]]:
    """The images, the classifier, and what is to be said about it."""
    if options.model is None:
        plain = RobustTrain(
            data=options.data or DIGITS, out=options.out / "plain", resume=options.resume, method="plain",
            steps=PLAIN_STEPS, seed=options.seed,
        )  # fmt: skip
        images = load_images(plain.data, held_out=plain.held_out, seed=plain.seed)
        description, params, _ = train(plain, images, console)
        save_classifier(plain.out, description, params)
        return images, description, params, [f"A plain classifier, {PLAIN_STEPS} steps without attack."]
    return loaded(options.model, options.data)


def loaded(model: Path, data: str | None) -> tuple[Images, Description, Params, list[str]]:
    """The images, `data` or those that the classifier in `model` was trained on, the classifier, and about it.

    Raises FileNotFoundError, and ValueError if the classifier does not take such images.
    """
    description, params = load_classifier(model)
    images = load_images(data or description.data, held_out=description.held_out, seed=description.seed)
    if images.x_test.shape[1:] != description.image or images.num_classes > description.num_classes:
        raise ValueError(
            f"--model {model} takes images {description.image} of {description.num_classes} classes; "
            f"{images.name} has {images.x_test.shape[1:]} of {images.num_classes}"
        )
    lanes = len(jax.tree.leaves(params)[0])
    about = [f"The model was trained on {description.data}." + (f" The first of {lanes} seeds." if lanes > 1 else "")]
    return images, description, params, about


def check(options: Attack) -> None:
    """Raises ValueError naming the option that makes no sense."""
    for name in ("examples", "steps", "restarts", "pictures", "batch_size"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if not options.attacks or not options.epsilons:
        raise ValueError("--attacks and --epsilons need at least one each")
    if len(set(options.epsilons)) < len(options.epsilons) or not all(epsilon > 0 for epsilon in options.epsilons):
        raise ValueError(f"--epsilons must be positive and differ, got {options.epsilons}")
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}")
