"""After how long the next turn of a conversation comes: a life table of all of them, and one's own gaps.

Bins of time since the end of a turn grow by the square root of two. Each bin counts the turns that were still
awaited when it began, and those that came in it; those that are still awaited count as well, so that nobody
who never comes back makes the others look sooner than they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, final

_FIRST_S = 0.25
NUM_BINS: Final = 27
# The end of each bin, in seconds: 0.25 s to 34 min.
BIN_ENDS: Final = tuple(_FIRST_S * math.sqrt(2.0) ** index for index in range(NUM_BINS))
_PRIOR_TURNS = 4.0  # awaited in each bin, and none came: before anything is known
_SHARED_WEIGHT = 2.0  # turns of one's own that the table of all counts as


def bin_of(gap_s: float) -> int:
    """The bin of a gap, the last one for gaps behind all of them."""
    if gap_s <= _FIRST_S:
        return 0
    return min(NUM_BINS - 1, math.ceil(2.0 * math.log2(gap_s / _FIRST_S) - 1e-9))


@final
class ReturnTimes:
    """Counts gaps between turns, and says what they make likely."""

    def __init__(self) -> None:
        self._awaited = [0] * NUM_BINS
        self._came = [0] * NUM_BINS

    @property
    def num_returns(self) -> int:
        return sum(self._came)

    def awaited(self, index: int) -> None:
        """Says that a turn has not come when a bin begins."""
        self._awaited[index] += 1

    def came(self, index: int, last: int) -> None:
        """Says that a turn came in a bin, of which it was only learnt in a ``last`` bin, no earlier."""
        for later in range(index + 1, last + 1):
            self._awaited[later] -= 1
        self._came[index] += 1

    def hazard(self, index: int, own: Sequence[int]) -> float:
        """P(a turn comes in a bin, if it has not come before).

        Args:
            own: bins of earlier gaps of that conversation.
        """
        everybody = self._came[index] / (self._awaited[index] + _PRIOR_TURNS)
        mine = own.count(index)
        risked = sum(1 for gap in own if gap >= index)
        return (_SHARED_WEIGHT * everybody + mine) / (_SHARED_WEIGHT + risked)

    def comes_within(self, first: int, last: int, own: Sequence[int]) -> float:
        """P(a turn comes in bins ``first`` to ``last``, if it has not come before)."""
        stays_away = 1.0
        for index in range(first, min(last + 1, NUM_BINS)):
            stays_away *= 1.0 - self.hazard(index, own)
        return 1.0 - stays_away

    def best_keep_s(self, holding_s: float, reload_s: float, own: Sequence[int]) -> float:
        """How long to keep what a turn left, so that the expected cost is least.

        Args:
            holding_s: cost of a second of keeping it.
            reload_s: cost of having to bring it back, if the turn comes later than that.
            own: bins of earlier gaps of that conversation.

        Returns:
            Seconds: 0, or the end of a bin.
        """
        hazards = [self.hazard(index, own) for index in range(NUM_BINS)]
        alive = [1.0]
        for hazard in hazards:
            alive.append(alive[-1] * (1.0 - hazard))
        best_s, least = 0.0, (alive[0] - alive[-1]) * reload_s
        held_s, begin_s = 0.0, 0.0
        for index, end_s in enumerate(BIN_ENDS):
            held_s += (end_s - begin_s) * (alive[index] + alive[index + 1]) / 2
            begin_s = end_s
            cost = held_s * holding_s + (alive[index + 1] - alive[-1]) * reload_s
            if cost < least:
                best_s, least = end_s, cost
        return best_s
