"""verl imports this module in a trainer's processes where `phases.environment` says so: from then on its timers write
which phase they time. Without the variable of the file's path it changes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import verl.utils.debug
import verl.utils.profiler

from runner.workloads.rl import phases

if path := os.environ.get(phases.FILE):
    # Trainers take it from either place, and are imported after this.
    for module in (verl.utils.profiler, verl.utils.debug):
        module.marked_timer = phases.noted(module.marked_timer, Path(path))
