"""`jaxalign features`: a page that shows what the features of a sparse autoencoder stand for."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Features:
    """Make the dashboard of a run of `jaxalign sae`: for every feature the text it fires on and what it writes.

    One HTML file that works without a network, with search by token or number: the strongest examples with each token
    coloured by how much it activates the feature, examples from each quarter of its firings by strength, a histogram,
    the tokens whose logits it raises and lowers, and the features it fires together with; for all of them how often
    they fire, and the run's frontier. Its address takes #feature=12&q=the, so that findings can be passed on.

    Example: jaxalign features runs/sae --sae k=32
    """

    run_directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = Path("runs/sae")
    """The run directory of `jaxalign sae`."""
    sae: str | None = None
    """Which of its autoencoders, by the name in the report, such as k=32. Default: the one in the middle."""
    out: Path | None = None
    """The file to write. Default: features-NAME.html in the run directory."""
    tokens: int = 300_000
    """Look at most at so many tokens of the run's text, evenly spread."""
    features: int = 8192
    """Show examples of at most so many features, those that fire most; the rest are listed with what is known of them.
    A feature takes 0.8 KB of the page."""
    top: int = 8
    """Strongest examples of each feature, one of each row of text at most."""
    per_quarter: int = 3
    """Examples from each quarter of its firings."""
    logits: int = 8
    """Tokens that it raises, and that it lowers, most."""
    seed: int = 0
    """Of the firings drawn."""

    def run(self) -> None:
        """Run the autoencoder over the run's activations and write the page."""
        from rich.console import Console

        from jaxalign.cli.features_run import run

        run(self, Console())
