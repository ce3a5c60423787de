"""The other library's side: an environment of its own in .peers/, and one script per benchmark in peer/."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
PACKAGES = ("transformers", "trl", "peft", "psutil")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VARIABLE = "JAXALIGN_PEER_PYTHON"


class RunFailed(RuntimeError):
    """A measuring process ended badly; the message ends with what it last said."""


def interpreter() -> pathlib.Path | None:
    """The peer environment's Python: the one JAXALIGN_PEER_PYTHON names, or that of .peers/, or None if absent."""
    named = os.environ.get(VARIABLE)
    if named:
        path = pathlib.Path(named)
        if not path.exists():
            raise FileNotFoundError(f"{VARIABLE} is set to {named}, which does not exist")
        return path
    path = _python(ROOT / ".peers")
    return path if path.exists() else None


def _python(folder: pathlib.Path) -> pathlib.Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def install_commands(folder: pathlib.Path, *, cpu_only: bool) -> list[list[str]]:
    """What makes the environment: the venv, torch at its pin (the small CPU build if asked), then the rest."""
    pip = [str(_python(folder)), "-m", "pip", "install"]
    index = ["--index-url", TORCH_CPU_INDEX] if cpu_only else []
    return [[sys.executable, "-m", "venv", str(folder)], [*pip, TORCH, *index], [*pip, *PACKAGES]]


def install() -> pathlib.Path:
    """Make .peers/ and return its Python. Without an NVIDIA driver on Linux, torch's CPU build is tried first."""
    folder = ROOT / ".peers"
    cpu_only = sys.platform == "linux" and shutil.which("nvidia-smi") is None
    create, torch, rest = install_commands(folder, cpu_only=cpu_only)
    subprocess.run(create, check=True)
    if subprocess.run(torch, check=False).returncode != 0:
        if not cpu_only:
            raise RunFailed(f"could not install {TORCH}")
        print(f"no {TORCH} at {TORCH_CPU_INDEX}: taking the package index's own build")
        subprocess.run(install_commands(folder, cpu_only=False)[1], check=True)
    subprocess.run(rest, check=True)
    return _python(folder)


def ask(command: list[str], case: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    """Run a measuring process: the case as JSON on stdin, its answer the last line of stdout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(case),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunFailed(f"took longer than {timeout:.0f} s") from None
    if done.returncode != 0:
        last = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise RunFailed(f"ended with status {done.returncode}: {last}")
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise RunFailed(f"printed no JSON object: {done.stdout[-200:]!r}") from error


def absence(script: pathlib.Path) -> str | None:
    """Why this benchmark's peer cannot run here, or None if it can."""
    if interpreter() is None:
        return f"no peer environment: `python -m benchmarks peers` makes one, or set {VARIABLE}"
    if not script.exists():
        return "this benchmark has no peer"
    return None
