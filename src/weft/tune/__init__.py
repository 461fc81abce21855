"""Training an adapter from a recipe: the loop, its checkpoints, what is measured before and after."""

from weft.tune.ahead import plan
from weft.tune.checkpoint import CheckpointError
from weft.tune.evaluate import evaluate, measure
from weft.tune.machine import OutputError
from weft.tune.many import tune_many
from weft.tune.outcome import TuneResult
from weft.tune.run import DryRun, dry_run, tune
from weft.tune.stop import Interrupted

__all__ = [
    "CheckpointError",
    "DryRun",
    "Interrupted",
    "OutputError",
    "TuneResult",
    "dry_run",
    "evaluate",
    "measure",
    "plan",
    "tune",
    "tune_many",
]
