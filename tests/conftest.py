"""Every test runs with strict rank promotion, no network, and a compilation cache shared between runs."""

import importlib.metadata
import os
import socket
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
# Compiling fusions the older way takes half as long; from jaxlib 0.11 on an unknown flag ends the process.
os.environ["XLA_FLAGS"] += (
    " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""
)
# Nearly all of a test's time is compilation, and half of that is optimisation no test needs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "jaxalign-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

LONGEST = ("test_contracts.py", "test_tour.py", "test_dpo.py", "test_rlhf_job.py", "test_reward_job.py")


def pytest_collection_modifyitems(items):
    """The longest files first: begun last, they would keep one worker busy while the others are done."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="module")
def forget_programs(request):
    """Compiled programs are let go after each file; together they would take gigabytes.

    A file whose OPTIMIZED is true computes for longer than it compiles, and is compiled as usual.
    """
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] not in ("0", "")
    jax.config.update("jax_disable_most_optimizations", quick and not getattr(request.module, "OPTIMIZED", False))
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Tests must not reach out: a connection to anywhere but this machine fails by name."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
