"""Where data sets are looked for and where what is computed from them is kept."""

import os
from pathlib import Path

__all__ = ["cache_root", "data_root"]


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return ``root``, else the environment variable DD_DATA, else the user's cache folder."""
    return Path(root or os.environ.get("DD_DATA") or cache_root()).expanduser()


def cache_root() -> Path:
    """Return the user's cache folder of this package; DD_DATA may be read-only, this is not."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "decoupled-descent"
