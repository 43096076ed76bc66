"""The error of a question that the store cannot answer. Knows nothing of SQL."""

from samplers.errors import LamtuneError


class NotInStore(LamtuneError):  # noqa: N818 - reads as the sentence it is
    """The store has no such job, evaluation or result; the message says what it has instead."""
