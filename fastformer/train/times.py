"""The clocks of a run; they are in its checkpoints, and no clock of the machine's date is among them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Times:
    """Seconds that went by, those of earlier, interrupted processes included.

    Attributes:
      run: from the first compilation on, without what lies between two processes.
      stepping: of those, in training steps alone.
      waiting: of those, for the next batch; the first of each process is left out.
    """

    run: float = 0.0
    stepping: float = 0.0
    waiting: float = 0.0
