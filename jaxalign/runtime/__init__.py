"""The host of training: `fit`, its checkpoints and metrics files, and reports of what came out."""

from jaxalign.runtime.checkpoint import DamagedCheckpointError
from jaxalign.runtime.figures import curves, maps
from jaxalign.runtime.fit import NonFiniteError, StopTraining, fit
from jaxalign.runtime.metrics import read_metrics
from jaxalign.runtime.preemption import Preempted
from jaxalign.runtime.report import Report, estimate
from jaxalign.runtime.resumable_sweep import resumable_sweep

__all__ = [
    "DamagedCheckpointError",
    "NonFiniteError",
    "Preempted",
    "Report",
    "StopTraining",
    "curves",
    "estimate",
    "fit",
    "maps",
    "read_metrics",
    "resumable_sweep",
]
