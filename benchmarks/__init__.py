"""One short script per question: `python -m benchmarks --list`, `python -m benchmarks NAME`.

A benchmark is a file NAME.py that answers the question in its docstring by two functions:

    cases(quick: bool) -> list[dict]      JSON-ready settings, each with a "name"; no JAX in here
    run(case: dict) -> Measurement        measures one of them (see measure.py)

and, where a user would otherwise pick another library, a script peer/NAME.py that runs in an environment of its own,
reads the same case as JSON on stdin and prints one JSON object with the fields of Measurement. Every case and side runs
in a fresh process, so its peak memory is its own; sides and cases take turns, so a busy machine is busy for all.
"""
