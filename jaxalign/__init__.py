"""jaxalign: pure functions for AI alignment in JAX, and four contracts that compose them.

The contracts (`Network`, `Algorithm`, `TrainState`, `train`, `sweep`) are here; each domain is a
package of its own (`jaxalign.preferences`, `jaxalign.networks`, ...) that is imported on first use.
"""

import importlib
from types import ModuleType

from jaxalign.algorithm import Algorithm, LanguageModel, Network, TrainState, gradient_algorithm, train
from jaxalign.sweeps import replicate, sweep

__version__ = "0.1.0"

DOMAINS = ("interop", "networks", "preferences", "runtime", "statistics")

__all__ = [
    "Algorithm",
    "LanguageModel",
    "Network",
    "TrainState",
    "gradient_algorithm",
    "replicate",
    "sweep",
    "train",
]


def __getattr__(name: str) -> ModuleType:
    if name in DOMAINS:
        return importlib.import_module(f"jaxalign.{name}")
    raise AttributeError(f"module 'jaxalign' has no attribute {name!r}; its domains are {', '.join(DOMAINS)}")


def __dir__() -> list[str]:
    return sorted([*__all__, *DOMAINS, "__version__"])
