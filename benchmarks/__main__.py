"""Run the benchmarks: `python -m benchmarks --list`, `python -m benchmarks NAME`, `python -m benchmarks peers`."""

import argparse
import pathlib
import sys

from benchmarks import peers
from benchmarks.report import add_baseline, load_baseline, show, write
from benchmarks.schedule import FOLDER, discover, run_benchmark


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    command.add_argument("names", nargs="*", help="benchmarks to run, all by default; or `peers` to make .peers/")
    command.add_argument("--quick", action="store_true", help="small shapes; the file goes to runs/benchmarks/")
    command.add_argument("--list", action="store_true", help="name every benchmark and its question")
    command.add_argument("--no-peer", action="store_true", help="measure our side only")
    command.add_argument("--rounds", type=int, help="fresh processes per case and side: 3, or 1 with --quick")
    command.add_argument("--cases", help="only the cases whose name contains this")
    command.add_argument("--baseline", type=pathlib.Path, help="an older JSON file to divide by")
    command.add_argument("--out", type=pathlib.Path, help="the JSON file, where one benchmark is run")
    command.add_argument("--timeout", type=float, default=3600.0, help="seconds one process may take")
    command.add_argument("--folder", type=pathlib.Path, default=FOLDER, help="where the benchmarks lie")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if a side failed, 2 if the request makes no sense."""
    command = parser()
    asked = command.parse_args(arguments)
    if asked.names == ["peers"]:
        for environment in peers.ENVIRONMENTS:
            print(f"peer environment ready: {peers.install(environment)}")
        return 0
    found = discover(asked.folder.resolve())
    if unknown := [name for name in asked.names if name not in found]:
        command.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(found)}")
    if asked.list:
        for benchmark in found.values():
            against = " (with a peer)" if benchmark.peer.exists() else ""
            question = " ".join(benchmark.question.partition("\n\n")[0].split())
            print(f"{benchmark.name}{against}: {question}")
        return 0
    chosen = [found[name] for name in asked.names or found]
    if (asked.out or asked.baseline) and len(chosen) != 1:
        command.error("--out and --baseline go with one benchmark")
    if asked.rounds is not None and asked.rounds < 1:
        command.error("--rounds must be at least 1")
    baseline = None if asked.baseline is None else load_baseline(asked.baseline)
    failed = False
    for benchmark in chosen:
        document = run_benchmark(
            benchmark,
            quick=asked.quick,
            rounds=asked.rounds or (1 if asked.quick else 3),
            with_peer=not asked.no_peer,
            only=asked.cases,
            timeout=asked.timeout,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        if baseline is not None:
            add_baseline(document, baseline)
        platform = (document["environment"] or {"platform": "unknown"})["platform"]
        folder = peers.ROOT / "runs" / "benchmarks" if asked.quick else FOLDER / "results"
        path = asked.out or folder / f"{benchmark.name}-{platform}.json"
        write(document, path)
        show(document)
        print(f"written to {path}")
        failed |= any("failed" in case[side] for case in document["cases"] for side in ("jaxalign", "peer"))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
