"""When a trial has lost: it is worse than a rival by more than the noise that the two do not share.

A pure function of distances and influences at equally many images with the same random numbers. Knows nothing of
what the trials are.
"""

from statistics import NormalDist

from objectives.paired import difference_error, first
from search.strategies.base import Point

ERROR = 1e-3
"""The probability to stop a trial that is as good as all its rivals, over all rungs of the trial."""


def has_lost(point: Point, rival: Point, images: int, looks: int) -> bool:
    """Whether `point` is worse than `rival` on the first `images` images, beyond chance.

    One-sided test of the paired difference; each of `looks`, one per rung and rival, gets an equal share of ERROR
    (Bonferroni). Without both influences, or both distances, nothing is decided.
    """
    if point.influence is None or rival.influence is None:
        return False
    mine, theirs = first(point.influence, images), first(rival.influence, images)
    if len(mine) != len(theirs) or len(mine) < 2:
        return False
    behind = point.at(images) - rival.at(images)
    return behind > NormalDist().inv_cdf(1 - ERROR / looks) * difference_error(mine, theirs)
