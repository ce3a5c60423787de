"""The command line: `jaxalign JOB`, one file a job, each importing only what it runs."""

import os
import sys
from collections.abc import Sequence
from typing import Any

TRACEBACK = "JAXALIGN_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one job. What the user can mend (a bad file, a refused directory) is one line on stderr and exit code 2.

    With JAXALIGN_TRACEBACK set, errors keep their traceback.
    """
    import tyro

    from jaxalign.cli.attack import Attack
    from jaxalign.cli.certify import Certify
    from jaxalign.cli.circuits import Circuits
    from jaxalign.cli.dpo import Dpo
    from jaxalign.cli.features import Features
    from jaxalign.cli.generate import Generate
    from jaxalign.cli.grpo import Grpo
    from jaxalign.cli.irl import Irl
    from jaxalign.cli.overoptimize import Overoptimize
    from jaxalign.cli.ppo import Ppo
    from jaxalign.cli.ppo_lm import PpoLm
    from jaxalign.cli.reward import Reward
    from jaxalign.cli.rlhf import Rlhf
    from jaxalign.cli.robust_train import RobustTrain
    from jaxalign.cli.sae import Sae
    from jaxalign.cli.tour import Tour

    jobs: dict[str, Any] = {
        "attack": Attack, "certify": Certify, "circuits": Circuits, "dpo": Dpo, "features": Features,
        "generate": Generate, "grpo": Grpo, "irl": Irl, "overoptimize": Overoptimize, "ppo": Ppo, "ppo-lm": PpoLm,
        "reward": Reward, "rlhf": Rlhf, "robust-train": RobustTrain, "sae": Sae, "tour": Tour,
    }  # fmt: skip
    job = tyro.extras.subcommand_cli_from_dict(
        jobs,
        args=arguments,
        prog="jaxalign",
        description="Alignment research in JAX. Start with `jaxalign tour`; `jaxalign JOB --help` explains a job.",
    )
    from jaxalign.interop import PretrainedUnavailable
    from jaxalign.runtime import DamagedCheckpointError

    mendable = (OSError, ValueError, ImportError, FloatingPointError, PretrainedUnavailable, DamagedCheckpointError)
    try:
        job.run()
    except mendable as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"jaxalign: {error}\n({TRACEBACK}=1 shows where)", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if str(stop) and not isinstance(stop.code, str):
            print(f"jaxalign: {stop}", file=sys.stderr)
        raise
