"""The folder in which lamtune keeps what it would otherwise have to compute again.

Knows nothing of what is kept there.
"""

import os
from pathlib import Path


def cache_root() -> Path:
    """$LAMTUNE_CACHE, else $XDG_CACHE_HOME/lamtune, else ~/.cache/lamtune. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LAMTUNE_CACHE") or Path(base, "lamtune"))
