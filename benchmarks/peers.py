"""The other library's side: environments of its own in .peers*/, and one script per benchmark in peer/."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VARIABLE = "JAXALIGN_PEER_PYTHON"


class Environment(NamedTuple):
    """What is installed beside torch, in which folder, for the peers of which benchmarks.

    alone: installed without what they ask for themselves
    """

    folder: str
    packages: tuple[str, ...]
    benchmarks: tuple[str, ...]
    alone: tuple[str, ...] = ()


# imitation holds huggingface_hub and gymnasium at versions that transformers cannot live with.
ENVIRONMENTS = (
    Environment(".peers", ("transformers", "trl", "peft", "psutil"), ("dpo", "generation", "reward_model")),
    Environment(".peers-attacks", ("foolbox", "torchattacks", "psutil"), ("attacks",)),
    # auto_LiRPA asks for a torch that has no wheel for today's Python; peer/auto_lirpa_today.py makes it run on ours.
    Environment(".peers-certify", ("appdirs", "numpy", "psutil", "tqdm"), ("certify",), alone=("auto_LiRPA==0.3",)),
    Environment(".peers-imitation", ("imitation", "psutil"), ("bayesian_irl", "gail", "irl")),
    Environment(".peers-rl", ("rlax", "torchrl", "rejax", "gymnax<1", "stable-baselines3", "psutil"), ("gae", "ppo")),
    Environment(".peers-sae", ("sae-lens", "psutil"), ("sae", "synth_sae")),
)


def environment_of(benchmark: str) -> Environment:
    """Where the benchmark's peer lives; the first environment for those that no environment names."""
    return next((e for e in ENVIRONMENTS if benchmark in e.benchmarks), ENVIRONMENTS[0])


class RunFailed(RuntimeError):
    """A measuring process ended badly; the message ends with what it last said."""


def interpreter(benchmark: str) -> pathlib.Path | None:
    """The Python of the benchmark's peer: the one JAXALIGN_PEER_PYTHON names, or its environment's, or None."""
    named = os.environ.get(VARIABLE)
    if named:
        path = pathlib.Path(named)
        if not path.exists():
            raise FileNotFoundError(f"{VARIABLE} is set to {named}, which does not exist")
        return path
    path = _python(ROOT / environment_of(benchmark).folder)
    return path if path.exists() else None


def _python(folder: pathlib.Path) -> pathlib.Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def install_commands(folder: pathlib.Path, packages: tuple[str, ...], *, cpu_only: bool) -> list[list[str]]:
    """What makes an environment: the venv, torch at its pin (the small CPU build if asked), then the packages."""
    pip = [str(_python(folder)), "-m", "pip", "install"]
    index = ["--index-url", TORCH_CPU_INDEX] if cpu_only else []
    return [[sys.executable, "-m", "venv", str(folder)], [*pip, TORCH, *index], [*pip, *packages]]


def install(environment: Environment) -> pathlib.Path:
    """Make an environment, return its Python. Without an NVIDIA driver on Linux, torch's CPU build is tried first."""
    folder, packages = ROOT / environment.folder, environment.packages
    cpu_only = sys.platform == "linux" and shutil.which("nvidia-smi") is None
    create, torch, rest = install_commands(folder, packages, cpu_only=cpu_only)
    subprocess.run(create, check=True)
    if subprocess.run(torch, check=False).returncode != 0:
        if not cpu_only:
            raise RunFailed(f"could not install {TORCH}")
        print(f"no {TORCH} at {TORCH_CPU_INDEX}: taking the package index's own build")
        subprocess.run(install_commands(folder, packages, cpu_only=False)[1], check=True)
    subprocess.run(rest, check=True)
    if environment.alone:
        subprocess.run([*rest[:4], "--no-deps", *environment.alone], check=True)
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
    if interpreter(script.stem) is None:
        return f"no peer environment: `python -m benchmarks peers` makes one, or set {VARIABLE}"
    if not script.exists():
        return "this benchmark has no peer"
    return None
