"""Learning rewards from behaviour."""

from jaxalign.irl.trajectories import (
    Trajectories,
    check_trajectories,
    feature_expectations,
    pad_trajectories,
    sample_trajectories,
    visit_counts,
)

__all__ = [
    "Trajectories",
    "check_trajectories",
    "feature_expectations",
    "pad_trajectories",
    "sample_trajectories",
    "visit_counts",
]
