"""What may go wrong with a store beside what LamtuneError says of all. Knows nothing of SQL."""

from samplers.errors import LamtuneError


class NotInStore(LamtuneError):  # noqa: N818 - reads as the sentence it is
    """The store has no such job, evaluation or result; the message says what it has instead."""


class ConnectionLost(LamtuneError):  # noqa: N818 - as above
    """The database went away amid a transaction: whether that one counts is not known, what is stored is true."""


class TakenOver(LamtuneError):  # noqa: N818 - as above
    """Another process has claimed the job since this one did: nothing of this one's is stored any more."""
