"""Checkpoints of a training state: committed whole, verified when read, never overwritten."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.runtime.chunks import named_leaves
from jaxalign.types import Array


class DamagedCheckpointError(RuntimeError):
    """A checkpoint cannot be read, or what was read is not what was written."""


class Restored(NamedTuple):
    """step: steps done; state: without its `frozen` leaves; metrics: the dtype of each metric by name."""

    step: int
    state: Any
    metrics: dict[str, str]


@jax.jit
def digests(tree: Any) -> list[Array]:
    """One uint32 per leaf: `sum_i (2 i + 1) * bits_i mod 2^32` over the leaf's 32-bit words, i a hash of the index.

    The weights are odd, so one changed bit always changes the sum. Integer addition is associative, so the result does
    not depend on how the leaf is sharded. It guards against damage, not against malice.
    """

    def digest(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            x = jnp.stack([x.real, x.imag])
        if x.dtype in (jnp.bool_, jnp.int4, jnp.uint4):
            x = x.astype(jnp.uint8)
        words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            place = place * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum((2 * place + 1) * bits, dtype=jnp.uint32)

    return [digest(leaf) for leaf in jax.tree.leaves(tree)]


def _describe(tree: Any) -> dict[str, list[Any]]:
    """{leaf name: [shape and dtype as text, digest]}."""
    leaves = named_leaves(tree)
    sums = jax.device_get(digests(tree))
    return {n: [f"{x.dtype}{list(x.shape)}", int(d)] for (n, x), d in zip(leaves.items(), sums, strict=True)}


def _payload(tree: Any) -> Any:
    """What Orbax will take: no zero-size leaves, which carry nothing, and no array that is the whole tree."""
    payload = jax.tree.map(lambda x: x if x.size else None, tree)
    return {"value": payload} if isinstance(payload, jax.Array) else payload


class Checkpoints:
    """The checkpoints of one run under `directory/checkpoints/<steps done>`, the newest `keep` of them kept.

    Saves are asynchronous: `save` returns once the state is copied; `wait` returns once it is on disk. A checkpoint
    appears under its name only when it is complete, so a kill leaves the ones before it as they were.
    """

    def __init__(self, directory: Path, *, keep: int, fingerprint: Mapping[str, Any] | None, frozen: Any) -> None:
        import orbax.checkpoint as ocp

        if keep < 1:
            raise ValueError(f"fit: keep must be at least 1, got {keep}")
        self._ocp = ocp
        self.directory = directory / "checkpoints"
        self._aside = directory / "damaged"
        self._fingerprint = None if fingerprint is None else _as_json(fingerprint)
        self._frozen = {f"frozen/{name}": value for name, value in _describe(frozen).items()}
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options)
        self.newest: int | None = self._manager.latest_step()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, state: Any, metrics: Mapping[str, np.ndarray]) -> None:
        """Begin to write the state after `step` steps; a step that is there already is left as it is."""
        if self.newest == step:
            return
        meta = {
            "step": step,
            "leaves": _describe(state) | self._frozen,
            "metrics": {name: str(value.dtype) for name, value in metrics.items()},
            "fingerprint": self._fingerprint,
            "jax": jax.__version__,
        }
        items = {"meta": self._ocp.args.JsonSave(meta)}
        if jax.tree.leaves(payload := _payload(state)):
            items["state"] = self._ocp.args.StandardSave(payload)
        self._manager.save(step, args=self._ocp.args.Composite(**items), force=True)
        self.newest = step

    def wait(self) -> None:
        """Return once every checkpoint begun is on disk; raises what went wrong in writing it."""
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> Restored | None:
        """The newest good checkpoint, or None if there is none at all.

        `like` is a state of the wanted structure, dtypes and shardings. A damaged checkpoint is named in a warning and
        moved to `directory/damaged`, and the one before it is tried.

        Raises ValueError naming what differs if a checkpoint was written by another algorithm, fingerprint or set of
        frozen leaves, and DamagedCheckpointError if there are checkpoints but none is good.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        failures: dict[int, str] = {}
        for step in steps:
            try:
                restored = self._read(step, like)
            except DamagedCheckpointError as error:
                failures[step] = str(error)
                continue
            for damaged, reason in failures.items():
                moved = self._set_aside(damaged)
                warnings.warn(
                    f"checkpoint {damaged} is damaged ({reason}); moved to {moved}, going on from {step}", stacklevel=3
                )
            self.newest = step
            return restored
        if failures:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in failures.items())
            raise DamagedCheckpointError(f"no good checkpoint in {self.directory}: {reasons}")
        return None

    def _read(self, step: int, like: Any) -> Restored:
        args = self._ocp.args
        try:
            meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore())).meta
            leaves, metrics = meta["leaves"], meta["metrics"]
        except Exception as error:  # Orbax and TensorStore raise many kinds; all of them mean "not readable"
            raise DamagedCheckpointError(f"its meta cannot be read: {_first_line(error)}") from error
        self._compare(meta, like)
        read: Any = None
        if jax.tree.leaves(wanted := _payload(like)):
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
            try:
                read = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(abstract))).state
            except Exception as error:
                raise DamagedCheckpointError(f"its arrays cannot be read: {_first_line(error)}") from error
        found = iter(jax.tree.leaves(read))
        state = jax.tree.map(lambda x: next(found) if x.size else x, like)
        if wrong := [name for name, value in _describe(state).items() if value != leaves[name]]:
            raise DamagedCheckpointError(f"{wrong[0]} is not what was written ({len(wrong)} leaves differ)")
        return Restored(step, state, metrics)

    def _compare(self, meta: Mapping[str, Any], like: Any) -> None:
        """Raise ValueError if the checkpoint belongs to another configuration, state structure or frozen model."""
        if self._fingerprint is not None:
            then, now = meta.get("fingerprint") or {}, self._fingerprint
            if differing := sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k)):
                said = ", ".join(f"{k}: {then.get(k)!r} then, {now.get(k)!r} now" for k in differing)
                raise ValueError(f"fit: {self.directory.parent} holds a run with another configuration ({said})")
        shapes = {name: f"{x.dtype}{list(x.shape)}" for name, x in named_leaves(like).items()}
        now = shapes | {name: text for name, (text, _) in self._frozen.items()}
        then = {name: text for name, (text, _) in meta["leaves"].items()}
        if differing := [name for name in now.keys() | then.keys() if now.get(name) != then.get(name)]:
            name = min(differing, key=lambda name: (not name.startswith("params/"), name))  # the most telling
            raise ValueError(
                f"fit: {self.directory.parent} holds a run of another algorithm: {name} is {then.get(name, 'absent')} "
                f"in the checkpoint and {now.get(name, 'absent')} in the state ({len(differing)} leaves differ)"
            )
        if changed := [name for name, value in self._frozen.items() if value != meta["leaves"][name]]:
            raise ValueError(
                f"fit: frozen leaves are not those the run in {self.directory.parent} began with: {changed[0]} "
                f"({len(changed)} differ); give the same pretrained parameters and the same key"
            )

    def _set_aside(self, step: int) -> Path:
        self._aside.mkdir(exist_ok=True)
        taken = {path.name for path in self._aside.iterdir()}
        name = next(n for n in (f"{step}-{i}" for i in range(len(taken) + 1)) if n not in taken)
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(self._aside / name)
        self._manager.reload()
        return self._aside / name


def _as_json(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(fingerprint), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"fit: `fingerprint` must be a dict of JSON values: {error}") from error


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}"
