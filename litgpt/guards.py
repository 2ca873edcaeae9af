"""What a long run watches: requests to stop, losses that leave their range, steps that must not be taken."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections import deque
from types import FrameType
from typing import Any

STOPPED_EXIT_CODE = 143
"""128 + SIGTERM: saved and not finished; the same command goes on."""
SPIKE_WINDOW = 64
"""Losses that the median and its deviation are taken of."""
SPIKE_MINIMUM = 16
"""With fewer of them nothing is called a spike."""


class StopRequest:
    """SIGTERM (a preemption) or the time limit, to be asked for between two steps.

    Args:
        seconds: of the limit, counted from here.
    """

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.signalled = False
        self.agreed = False
        """Whether any process was asked to; for whoever tells the others."""

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.signalled = True

    def __bool__(self) -> bool:
        return self.signalled or time.monotonic() >= self.deadline


class SpikeWatch:
    """Tells a loss that lies far above the recent ones.

    Args:
        factor: a spike is above the median by more than this times the median absolute deviation.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def threshold(self) -> float:
        """The loss above which a step is a spike; infinite before enough losses are known."""
        if len(self.recent) < SPIKE_MINIMUM:
            return math.inf
        median = statistics.median(self.recent)
        return median + self.factor * statistics.median(abs(loss - median) for loss in self.recent)

    def see(self, loss: float) -> float | None:
        """Add a step's loss; the threshold if it lies above. A spike counts among the recent losses, too."""
        threshold = self.threshold()
        self.recent.append(loss)
        return threshold if loss > threshold else None

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent = deque(state["recent"], maxlen=SPIKE_WINDOW)
