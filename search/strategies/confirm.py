"""Measures what a search has found on random numbers that it has not seen.

The least of many noisy distances is also the luckiest; what is reported must not be. λ = 1 and the search's finalists
are evaluated anew, the best one first; those that follow are stopped as soon as they have lost to it (`race`). Wraps
any strategy and knows nothing of how that one searches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from search.strategies.base import FINISHED, WAIT, Candidate, History, Point, Signal, Step, Strategy
from search.strategies.race import has_lost
from storage import CONFIRM


@dataclass(frozen=True, slots=True)
class Confirmed:
    """`strategy`, then its finalists and λ = 1 on `images` fresh images each; rungs: looks at a trial on the way."""

    strategy: Strategy
    images: int
    rungs: int

    def next(self, history: History) -> Step:
        """See `Strategy.next`."""
        searched, fresh = _parted(history)
        step = self.strategy.next(searched)
        if step is not Signal.FINISHED:
            return step
        ended = {point.setting for point in fresh if point.state != "running"}
        wanted = tuple(c for c in self._candidates(searched) if c.setting not in ended)
        if not wanted:
            return FINISHED
        return WAIT if any(point.state == "running" for point in fresh) else wanted

    def finalists(self, history: History) -> tuple[Candidate, ...]:
        """See `Strategy.finalists`: those of the search, as it ranked them."""
        return self.strategy.finalists(_parted(history)[0])

    def expected_trials(self, history: History) -> int:
        """See `Strategy.expected_trials`."""
        searched, _ = _parted(history)
        expected = self.strategy.expected_trials(searched)
        return expected + max(len(self._candidates(searched)), 3 if expected > len(searched) else 1)

    def has_lost(self, history: History, point: Point) -> bool:
        """Whether a running trial need not go on: a finalist after the first that is behind a complete one."""
        searched, fresh = _parted(history)
        if not point.fresh or point.setting in [c.setting for c in self._candidates(searched)[:2]]:
            return False
        rivals = [rival for rival in fresh if rival.state == "complete" and rival.setting != point.setting]
        looks = self.rungs * len(rivals)
        return any(has_lost(point, rival, point.images, looks) for rival in rivals)

    def _candidates(self, searched: History) -> list[Candidate]:
        """λ = 1, then the finalists, each once."""
        found = [Candidate(CONFIRM, 1, 0, images=self.images, fresh=True)]
        for candidate in self.strategy.finalists(searched):
            anew = replace(candidate, phase=CONFIRM, images=self.images, fresh=True)
            if anew.setting not in [c.setting for c in found]:
                found.append(anew)
        return found


def _parted(history: History) -> tuple[list[Point], list[Point]]:
    return [p for p in history if not p.fresh], [p for p in history if p.fresh]
