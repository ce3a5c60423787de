"""jaxalign: pure functions for AI alignment in JAX, and four contracts that compose them.

The contracts (`Network`, `Algorithm`, `TrainState`, `train`, `sweep`) are here; each domain is a
package of its own (`jaxalign.preferences`, `jaxalign.networks`, ...). All are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxalign.algorithm import Algorithm, LanguageModel, Network, TrainState, gradient_algorithm, train
    from jaxalign.early_stopping import with_early_stopping
    from jaxalign.sweeps import replicate, sweep

__version__ = "0.1.0"

DOMAINS = (
    "certification", "environments", "interop", "interpretability", "irl", "mdp", "networks", "preferences", "rl",
    "rlhf", "robustness", "runtime", "statistics",
)  # fmt: skip

_HOME = {
    "Algorithm": "algorithm",
    "LanguageModel": "algorithm",
    "Network": "algorithm",
    "TrainState": "algorithm",
    "gradient_algorithm": "algorithm",
    "replicate": "sweeps",
    "sweep": "sweeps",
    "train": "algorithm",
    "with_early_stopping": "early_stopping",
}

__all__ = [
    "Algorithm",
    "LanguageModel",
    "Network",
    "TrainState",
    "gradient_algorithm",
    "replicate",
    "sweep",
    "train",
    "with_early_stopping",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"jaxalign.{_HOME[name]}"), name)
    if name in DOMAINS:
        return importlib.import_module(f"jaxalign.{name}")
    raise AttributeError(f"module 'jaxalign' has no attribute {name!r}; its domains are {', '.join(DOMAINS)}")


def __dir__() -> list[str]:
    return sorted([*__all__, *DOMAINS, "__version__"])
