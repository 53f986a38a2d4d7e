"""Where what was worked out once is kept for the next time."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """$NEXTBLOCK_CACHE, else ~/.cache/nextblock."""
    return Path(os.environ.get("NEXTBLOCK_CACHE") or Path.home() / ".cache" / "nextblock")
