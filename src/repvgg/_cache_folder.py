"""The folder for files that can be made again: machine code, tuning results, compiled training kernels.

``REPVGG_CACHE_DIR`` names another folder than the user's cache folder; ``REPVGG_CACHE_DIR=off`` turns caching off.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "REPVGG_CACHE_DIR"


def cache_folder(kind: str) -> Path | None:
    """Return the folder for cached files of one ``kind``, or None if caching is off. It need not exist yet.

    Args:
        kind: name of the subfolder: ``engine`` or ``training``.
    """
    override = os.environ.get(VARIABLE)
    if override:
        return None if override == "off" else Path(override).expanduser() / kind
    return _user_cache_folder() / "repvgg" / kind


def _user_cache_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    # The XDG specification says that a relative path is to be ignored.
    configured = os.environ.get("XDG_CACHE_HOME", "")
    return Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
