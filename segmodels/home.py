"""The folder of what belongs to one user on one machine: keys, caches, the tune table."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """MASKMILL_HOME, else ~/.local/share/maskmill; made if need be, for its user alone (0700)."""
    path = Path(os.environ.get("MASKMILL_HOME") or Path.home() / ".local/share/maskmill")
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
