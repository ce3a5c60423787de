"""Where a measurement was taken: device, versions, load; and what the device can do at its best."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

# Dense peak, FLOP/s per device as JAX counts devices, from the makers' data sheets. Sparse peaks are twice as high.
# float32 on these GPUs is the rate outside the tensor cores. The longest kind that `device_kind` contains counts.
PEAK_FLOPS = {
    "H200": {"bfloat16": 989.4e12, "float16": 989.4e12, "tensorfloat32": 494.7e12, "float32": 66.9e12},
    "H100": {"bfloat16": 989.4e12, "float16": 989.4e12, "tensorfloat32": 494.7e12, "float32": 66.9e12},
    "H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "tensorfloat32": 378e12, "float32": 51.2e12},
    "A100": {"bfloat16": 312e12, "float16": 312e12, "tensorfloat32": 156e12, "float32": 19.5e12},
    "TPU v4": {"bfloat16": 275e12},
    "TPU v5 lite": {"bfloat16": 197e12},
    "TPU v5e": {"bfloat16": 197e12},
    "TPU v5p": {"bfloat16": 459e12},
    "TPU v5": {"bfloat16": 459e12},
    "TPU v6 lite": {"bfloat16": 918e12},
    "TPU v6e": {"bfloat16": 918e12},
}


def peak_flops(device_kind: str, arithmetic: str) -> float | None:
    """The peak FLOP/s of one device of this kind in this arithmetic, or None where it is not in the table."""
    kinds = [kind for kind in PEAK_FLOPS if kind.lower() in device_kind.lower()]
    return PEAK_FLOPS[max(kinds, key=len)].get(arithmetic) if kinds else None


def matmul_arithmetic(dtype: str) -> str:
    """What the matrix units compute in for arrays of this dtype: XLA's default rounds float32 inputs on GPU and TPU."""
    import jax

    if dtype != "float32" or jax.config.jax_default_matmul_precision not in (None, "default", "fastest"):
        return dtype
    return {"gpu": "tensorfloat32", "tpu": "bfloat16"}.get(jax.default_backend(), dtype)


def process_peak_bytes() -> int | None:
    """Peak resident memory of this process, or None where the system does not tell.

    Linux keeps VmHWM per program; `ru_maxrss` there starts from the peak of whoever started the process.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes() -> int | None:
    """The most memory any one device held, or None where its backend does not count (a CPU)."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def describe() -> dict[str, Any]:
    """Device, versions, cores, load, commit and date; no host name and no path. Starts the JAX backend."""
    import jax

    import jaxalign

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "matmul_precision": str(jax.config.jax_default_matmul_precision or "default"),
        "x64": bool(jax.config.jax_enable_x64),
        "xla_flags": [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "/" not in flag],
        "cpu": cpu_model(),
        "cores": cores(),
        "load_average": load_average(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jaxalign": jaxalign.__version__,
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cores() -> int | None:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def load_average() -> float | None:
    """Processes that wanted to run, on average over the last minute; more than `cores` means a contended machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_model() -> str | None:
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or None


def commit() -> str | None:
    """The commit of the sources, with "+" if they differ from it; None outside a git checkout."""
    root = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
