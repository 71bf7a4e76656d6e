"""Loss spikes: a step whose loss stands far above the recent ones, told with its batch.

    spike   ⇔   loss − median > k · max(1.4826·MAD, 0.01·median)

over the last losses (spikes left out of them); 1.4826·MAD is σ of a normal distribution, whatever a few
outliers do. V3 reports a whole run without an irrecoverable spike; to look into one, its rows are wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

WINDOW, FEWEST = 64, 16


@dataclass
class Spikes:
    """Watches the losses of a run. `sigmas` is k; 0 watches nothing. `recent` is saved with the run."""

    sigmas: float
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def expected(self, loss: float) -> float | None:
        """The median of the recent losses where `loss` is a spike above it, else None."""
        if self.sigmas and len(self.recent) >= FEWEST:
            usual = median(self.recent)
            spread = 1.4826 * median(abs(x - usual) for x in self.recent)
            if loss - usual > self.sigmas * max(spread, 0.01 * usual):
                return usual
        self.recent.append(loss)
        return None

    def restore(self, losses: Sequence[float]) -> None:
        """Go on with the losses of a checkpoint."""
        self.recent.clear()
        self.recent.extend(losses)
