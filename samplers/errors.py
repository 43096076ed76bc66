"""The errors that lamtune raises on purpose; every package uses these and the command line catches only the root.

Knows nothing of what went wrong: the message names the key or file at fault and the next step.
"""


class LamtuneError(Exception):
    """Something failed and the message says what; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class InputError(LamtuneError, ValueError):
    """What the user gave (a job file, checkpoint, option or URL) cannot be used."""

    exit_code = 2


class NonFiniteError(LamtuneError):
    """Images, features or a distance hold NaN or infinity: the schedule that led there is unusable."""
