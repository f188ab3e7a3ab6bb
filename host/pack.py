"""A host with this package's nodes."""

from __future__ import annotations

from .engine import Host
from .executor import Deliver
from .folders import DataFolders


def open_host(folders: DataFolders, deliver: Deliver | None = None) -> Host:
    """A host that knows the core nodes and the nodes of this package."""
    from .. import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    host = Host(folders, deliver)
    package = __name__.split(".")[-3]
    host.registry.add(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, python_module=f"custom_nodes.{package}")
    return host
