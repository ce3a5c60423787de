"""Which benchmarks there are, and the order in which their processes run."""

import ast
import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import peers
from benchmarks.environment import peak_flops
from benchmarks.measure import pool
from benchmarks.one_case import load

FOLDER = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A script with `cases` and `run`, found by reading it, not by importing it."""

    name: str
    script: pathlib.Path
    question: str

    @property
    def peer(self) -> pathlib.Path:
        """Where its peer's script lies, if it has one."""
        return self.script.parent / "peer" / self.script.name


def discover(folder: pathlib.Path = FOLDER) -> dict[str, Benchmark]:
    """The benchmarks of a folder by name."""
    found = {}
    for script in sorted(folder.glob("*.py")):
        tree = ast.parse(script.read_text(encoding="utf-8"), filename=str(script))
        if {"cases", "run"} <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            found[script.stem] = Benchmark(script.stem, script, ast.get_docstring(tree) or "")
    return found


def run_benchmark(
    benchmark: Benchmark,
    *,
    quick: bool,
    rounds: int,
    with_peer: bool = True,
    only: str | None = None,
    timeout: float = 3600.0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every case in fresh processes, `rounds` times over: peer, ours, peer, ours; returns the JSON document.

    `only` keeps the cases whose name contains it. A benchmark that has `prepare(cases)` first writes there what both
    sides read. A side that fails or is absent is recorded as such with its reason, and the others go on.
    """
    module = load(benchmark.script)
    cases = [case for case in module.cases(quick) if only is None or only in case["name"]]
    if not cases:
        raise ValueError(f"{benchmark.name} has no case with {only!r} in its name")
    if hasattr(module, "prepare"):
        say(f"{benchmark.name}: preparing")
        module.prepare(cases)
    why_absent = peers.absence(benchmark.peer) if with_peer else "left out by --no-peer"
    if not benchmark.peer.exists():
        why_absent = "this benchmark has no peer"
    ours = [sys.executable, "-m", "benchmarks.one_case", str(benchmark.script)]
    theirs = [str(peers.interpreter(benchmark.name)), str(benchmark.peer)] if why_absent is None else None
    taken: dict[tuple[int, str], list[dict[str, Any]]] = {}
    failed: dict[tuple[int, str], str] = {}
    environments: dict[str, Any] = {"jaxalign": None, "peer": None}
    for turn in range(rounds):
        for index, case in enumerate(cases):
            for side, command in (("peer", theirs), ("jaxalign", ours)):
                if command is None or (index, side) in failed:
                    continue
                say(f"{benchmark.name}: round {turn + 1} of {rounds}, {case['name']}, {side}")
                try:
                    answer = peers.ask(command, case, timeout=timeout)
                except peers.RunFailed as error:
                    failed[index, side] = str(error)
                    say(f"  failed: {error}")
                    continue
                measurement = answer.get("measurement", answer)
                environments[side] = answer["environment"]
                taken.setdefault((index, side), []).append(measurement)

    def outcome(index: int, side: str) -> dict[str, Any]:
        if (index, side) in failed:
            return {"failed": failed[index, side]}
        if (index, side) not in taken:
            return {"absent": why_absent}
        record = pool(taken[index, side])
        record.pop("environment", None)
        return record

    records = [
        {"name": case["name"], "case": case, "jaxalign": outcome(i, "jaxalign"), "peer": outcome(i, "peer")}
        for i, case in enumerate(cases)
    ]
    for record in records:
        compare(record, environments["jaxalign"], environments["peer"])
    return {
        "benchmark": benchmark.name,
        "question": benchmark.question,
        "quick": quick,
        "rounds": rounds,
        "environment": environments["jaxalign"],
        "peer_environment": environments["peer"] or {"absent": why_absent or "every run of it failed"},
        "cases": records,
    }


def measured(side: dict[str, Any]) -> bool:
    """Whether a side holds figures, and is neither absent nor failed."""
    return "rate" in side


def compare(record: dict[str, Any], environment: dict[str, Any] | None, peer: dict[str, Any] | None) -> None:
    """Fill in what needs both sides or the device: MFU, the peer's FLOPs, reasons for gaps, ratios ours over peer's."""
    ours, theirs = record["jaxalign"], record["peer"]
    if measured(ours) and measured(theirs) and theirs.get("flops") is None and ours["amount"] == theirs["amount"]:
        theirs["flops"] = ours["flops"]  # the same work
        theirs["flops_per_second"] = None if ours["flops"] is None else ours["flops"] / theirs["median"]
    for side, where in ((ours, environment), (theirs, peer)):
        if measured(side) and where is not None:
            side["mfu"], side["unmeasured"] = _utilisation(side, where["device_kind"])
    record["ratio"] = None
    if measured(ours) and measured(theirs) and ours["unit"] == theirs["unit"]:
        names = ("rate", "process_peak_bytes", "device_peak_bytes")
        record["ratio"] = {n: ours[n] / theirs[n] if ours.get(n) and theirs.get(n) else None for n in names}


def _utilisation(side: dict[str, Any], device_kind: str) -> tuple[float | None, dict[str, str]]:
    """Achieved over peak FLOP/s, and the reason for every figure that is None."""
    peak = peak_flops(device_kind, side["arithmetic"] or "")
    reached = side["flops_per_second"]
    mfu = None if peak is None or reached is None else reached / (peak * side["details"].get("devices", 1))
    reasons = {
        "compile": "part of the first run",
        "temp_bytes": "not one compiled program",
        "flops": "the benchmark states no formula",
        "flops_per_second": "the benchmark states no formula",
        "process_peak_bytes": "the system does not tell",
        "device_peak_bytes": f"the backend of {device_kind!r} does not count its memory",
        "mfu": "no FLOPs" if reached is None else f"no peak known for {device_kind!r} in {side['arithmetic']}",
    }
    values = {**side, "mfu": mfu}
    return mfu, {name: reason for name, reason in reasons.items() if values.get(name) is None}
