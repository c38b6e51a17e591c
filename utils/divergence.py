"""Does a run still know more than nothing? Its loss against that of an all-zero prediction, step after step.

Whatever the objective, a network that has learned nothing can predict zeros. A base model begins far below that loss
(0.05 to 0.3 of it); a run whose learning rate is too high rises to it within a few steps, often far beyond, and then
stays about there: its loss is finite, falls again and looks well. Standard library only: the report follows it too.
"""

import math
from collections import deque
from collections.abc import Iterable

RECENT = 20  # steps in the mean
KNEW = 0.8  # a first step below this comes from a network that has learned its objective
LOST = 0.95  # of the loss of zeros: such a network has lost what it knew when its own loss is above
MARGIN = 1.5  # a network that has not (random weights) diverges this far above its own beginning


class Divergence:
    """Follows loss / loss of zeros. The first step's value is the untouched network's, and sets the bound.

    Where it is below KNEW the run diverges when the mean of RECENT steps is above LOST; elsewhere when that is above
    MARGIN times the first value. It has recovered when the mean is below the middle between first value and bound.
    """

    def __init__(self):
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.first = None  # of the first step
        self.diverged = False

    def follow(self, ratio: float | None) -> bool:
        """Whether it is in this step that the run begins to diverge."""
        if ratio is None or not math.isfinite(ratio):  # such steps are the guard's affair
            return False
        self.first = ratio if self.first is None else self.first
        self.recent.append(ratio)
        if len(self.recent) < RECENT:
            return False
        began = not self.diverged and self.mean > self.bound
        self.diverged = self.mean > ((self.first + self.bound) / 2 if self.diverged else self.bound)
        return began

    @property
    def mean(self) -> float:
        return math.fsum(self.recent) / len(self.recent)

    @property
    def bound(self) -> float:
        return LOST if self.first < KNEW else MARGIN * self.first

    def __str__(self) -> str:
        return f"the loss is {self.mean:.2f} times that of predicting zeros ({self.first:.2g} in the first step)"


def of(rows: Iterable[dict]) -> Divergence:
    """What the lines of metrics.jsonl, in order, come to."""
    found = Divergence()
    for row in rows:
        value = row.get("against_zero")
        found.follow(value if isinstance(value, int | float) else None)
    return found
