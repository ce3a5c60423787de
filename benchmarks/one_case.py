"""One case of one benchmark in a process of its own: `python -m benchmarks.one_case SCRIPT < case.json`.

Prints one JSON object, {"measurement": ..., "environment": ...}; everything else goes to stderr.
"""

import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import sys
from types import ModuleType
from typing import Any


def load(script: pathlib.Path) -> ModuleType:
    """The benchmark in this file as a module, wherever the file lies."""
    specification = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run_case(script: pathlib.Path, case: dict[str, Any]) -> dict[str, Any]:
    """Measure, then add what only the whole process knows: its peak memory and its environment."""
    import jax

    from benchmarks import environment

    # A program from the persistent cache would make the compile time a fiction.
    jax.config.update("jax_enable_compilation_cache", False)
    measurement = dataclasses.asdict(load(script).run(case))
    measurement["side"] = "jaxalign"
    measurement["process_peak_bytes"] = environment.process_peak_bytes()
    measurement["device_peak_bytes"] = environment.device_peak_bytes()
    return {"measurement": measurement, "environment": environment.describe()}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = run_case(pathlib.Path(sys.argv[1]), json.load(sys.stdin))
    print(json.dumps(answer))
