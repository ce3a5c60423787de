"""The command line: `jaxalign JOB`, one file a job, each importing only what it runs."""

import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one job. What the user can mend (a bad file, a refused directory) is one line on stderr and exit code 2."""
    import tyro

    from jaxalign.cli.dpo import Dpo
    from jaxalign.cli.tour import Tour

    jobs: dict[str, Any] = {"dpo": Dpo, "tour": Tour}
    job = tyro.extras.subcommand_cli_from_dict(
        jobs,
        args=arguments,
        prog="jaxalign",
        description="Alignment research in JAX. Start with `jaxalign tour`; `jaxalign JOB --help` explains a job.",
    )
    try:
        job.run()
    except (OSError, ValueError, ImportError) as error:
        print(f"jaxalign: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if str(stop) and not isinstance(stop.code, str):
            print(f"jaxalign: {stop}", file=sys.stderr)
        raise
