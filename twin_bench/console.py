"""What commands show while they work."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def progress_bars(options: argparse.Namespace) -> Progress:
    """Return progress bars on stderr, which show nothing under --quiet."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), disable=options.quiet)
