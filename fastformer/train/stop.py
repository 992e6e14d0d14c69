"""A signal that asks to end: save first, then end well."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from fastformer.core.signals import Ended, asking


class Stop:
    """Within it, a signal that asks to end does so at once while nothing is to be saved, else sets ``asked``.

    Attributes:
      asked: a signal came.
      at_once: nothing would be lost by ending right now; it raises signals.Ended.
    """

    def __init__(self) -> None:
        self.asked, self.at_once = False, True
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for number in asking():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.at_once:
            raise Ended("stopped, with nothing left to save; the same command goes on")

    def agreed(self) -> bool:
        """Return whether any process was asked to stop: all must save the same step."""
        if jax.process_count() == 1:
            return self.asked
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self.asked))))
