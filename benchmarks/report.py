"""The table, the JSON file, and the ratio to an older file."""

import json
import pathlib
import re
from typing import Any

import rich.console
import rich.table

from benchmarks.schedule import measured

LONGEST_LIST = 32  # a case may carry token ids; the record keeps their shape


def load_baseline(path: pathlib.Path) -> dict[str, Any]:
    """An older file. Raises ValueError if it is not a benchmark's."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not {"benchmark", "cases"} <= document.keys():
        raise ValueError(f"{path} is not a file of `python -m benchmarks`: it has no 'benchmark' and 'cases'")
    return document


def add_baseline(document: dict[str, Any], baseline: dict[str, Any]) -> None:
    """Give each case `baseline`: new over old rate and memory of our side, or why there is none."""
    if document["benchmark"] != baseline["benchmark"]:
        raise ValueError(f"the baseline is of {baseline['benchmark']!r}, this is {document['benchmark']!r}")
    old_cases = {case["name"]: case for case in baseline["cases"]}
    for case in document["cases"]:
        old = old_cases.get(case["name"], {"jaxalign": {}})["jaxalign"]
        if not measured(old) or not measured(case["jaxalign"]):
            case["baseline"] = {"absent": "not measured in " + ("both files" if measured(old) else "the older file")}
            continue
        names = ("rate", "process_peak_bytes", "temp_bytes")
        now = case["jaxalign"]
        case["baseline"] = {n: now[n] / old[n] if now.get(n) and old.get(n) else None for n in names}
    old_kind, new_kind = (d["environment"] and d["environment"]["device_kind"] for d in (baseline, document))
    if old_kind != new_kind:
        document["baseline_device"] = old_kind


def write(document: dict[str, Any], path: pathlib.Path) -> None:
    """One JSON file; long lists in a case's settings are shortened to their shape, paths to their last part."""
    cases = [{**case, "case": _shortened(case["case"])} for case in document["cases"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_folders({**document, "cases": cases}), indent=1) + "\n", encoding="utf-8")


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    if isinstance(value, list) and (len(value) > LONGEST_LIST or any(isinstance(item, list) for item in value)):
        inner = sorted({len(item) for item in value if isinstance(item, list)})
        return f"{len(value)} items" + (f" of {' or '.join(map(str, inner[:4]))} each" if inner else "")
    return value


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[\\/](?:[^\s\\/'\":|]+[\\/])+", "", value)
    return value


def show(document: dict[str, Any], console: rich.console.Console | None = None) -> None:
    """Print one row per case and side."""
    if console is None:
        console = rich.console.Console()
        if not console.is_terminal:
            console = rich.console.Console(width=200)
    title = f"{document['benchmark']}: {document['question'].partition(chr(10))[0]}"
    table = rich.table.Table(title=title, title_justify="left")
    for heading in ("case", "side", "rate", "median [p10, p90], CPU", "compile + first", "peak, temp memory"):
        table.add_column(heading)
    for heading in ("GFLOP/s (MFU)", "quality", "rate, memory against"):
        table.add_column(heading)
    for case in document["cases"]:
        table.add_row(case["name"], *_row(case["jaxalign"], "jaxalign"), _against(case))
        if case["peer"].get("absent") != "this benchmark has no peer":
            table.add_row("", *_row(case["peer"], "peer"), "")
    console.print(table)
    environment = document["environment"]
    if environment is not None:
        names = ("device_kind", "devices", "cores", "load_average", "jax", "python", "commit", "date")
        console.print(", ".join(f"{name} {environment[name]}" for name in names), soft_wrap=True)
    if "baseline_device" in document:
        console.print(f"The baseline was taken on another device: {document['baseline_device']}", soft_wrap=True)


def _row(side: dict[str, Any], name: str) -> list[str]:
    if not measured(side):
        reason = f"absent: {side['absent']}" if "absent" in side else f"failed: {side['failed']}"
        return [name, rich.markup.escape(reason), "", "", "", "", ""]
    memory = f"{_bytes(side.get('device_peak_bytes') or side.get('process_peak_bytes'))}, {_bytes(side['temp_bytes'])}"
    mfu = f" ({side['mfu']:.1%})" if side.get("mfu") is not None else ""
    reached = "-" if side["flops_per_second"] is None else f"{side['flops_per_second'] / 1e9:.4g}{mfu}"
    median, low, high, cpu = (_seconds(side[key]) for key in ("median", "p10", "p90", "cpu_median"))
    times = f"{median} [{low}, {high}], {cpu}"
    scalars = {key: value for key, value in side["quality"].items() if isinstance(value, int | float)}
    return [
        side.get("side", name),
        f"{side['rate']:.4g} {side['unit']}/s",
        rich.markup.escape(times),
        f"{_seconds(side['compile'])} + {_seconds(side['first'])}",
        memory,
        reached,
        ", ".join(f"{key} {value:.5g}" for key, value in scalars.items()) or "-",
    ]


def _against(case: dict[str, Any]) -> str:
    parts = []
    for name in ("ratio", "baseline"):
        ratio = case.get(name)
        label = "peer" if name == "ratio" else "baseline"
        if ratio is None:
            continue
        if "absent" in ratio:
            parts.append(f"{label}: {ratio['absent']}")
            continue
        memory = ratio.get("device_peak_bytes") or ratio.get("process_peak_bytes")
        parts.append(f"{label} {ratio['rate']:.2f}x, " + ("-" if memory is None else f"{memory:.2f}x"))
    return "; ".join(parts)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.1f} MiB"
