"""What depends on a version of HELM. Imports no HELM."""

from __future__ import annotations

import importlib.metadata
import re

from twin_bench.errors import InputError

PLUGINS_SINCE = (0, 5, 12)
"""The first crfm-helm that loads plugins."""


def require_plugins() -> None:
    """Raise an InputError where this environment's HELM loads no plugins. Without HELM here, nothing is checked.

    helm-run may be in another environment than twin-bench helm-config.
    """
    try:
        found = importlib.metadata.version("crfm-helm")
    except importlib.metadata.PackageNotFoundError:
        return
    if tuple(int(part) for part in re.findall(r"\d+", found)[:3]) < PLUGINS_SINCE:
        wanted = ".".join(map(str, PLUGINS_SINCE))
        raise InputError(
            f"crfm-helm {found} takes no plugins, which came with {wanted}: pip install 'crfm-helm>=0.5.16'"
        )
