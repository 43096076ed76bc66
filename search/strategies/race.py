"""When a trial has lost: it is worse than a rival by more than the noise that the two do not share.

A pure function of distances and influences at equally many images with the same random numbers. Knows nothing of
what the trials are.
"""

import math

from scipy.special import stdtrit

from objectives.paired import difference_error, first
from search.strategies.base import Point

ERROR = 1e-3
"""The probability to stop a trial that is as good as all its rivals, over all rungs of the trial."""


def has_lost(point: Point, rival: Point, images: int, looks: int) -> bool:
    """Whether `point` is worse than `rival` on the first `images` images, beyond chance.

    One-sided t-test of the paired difference, since few blocks do not know their spread well; each of `looks`, one per
    rung and rival, gets an equal share of ERROR (Bonferroni). Without both influences, or both distances, nothing is
    decided.
    """
    if point.influence is None or rival.influence is None:
        return False
    mine, theirs = first(point.influence, images), first(rival.influence, images)
    if len(mine) != len(theirs) or len(mine) < 2:
        return False
    behind = point.at(images) - rival.at(images)
    evidence = float(stdtrit(len(mine) - 1, 1 - ERROR / looks))
    return math.isfinite(behind) and behind > evidence * difference_error(mine, theirs)
