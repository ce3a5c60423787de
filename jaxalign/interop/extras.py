"""Import a library of an optional extra, or say how to install it."""

import importlib
from typing import Any


def lm_extra(module: str) -> Any:
    """The module, imported now. Raises ImportError naming the extra to install."""
    return from_extra(module, "lm")


def from_extra(module: str, extra: str) -> Any:
    """The module, imported now. Raises ImportError naming the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'jaxalign.interop needs {module}: pip install "jaxalign[{extra}]"') from error
