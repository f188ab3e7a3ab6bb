"""A host with this package's nodes."""

from __future__ import annotations

from .engine import Host
from .executor import Deliver
from .folders import DataFolders


def open_host(folders: DataFolders, deliver: Deliver | None = None) -> Host:
    """A host that knows the core nodes and the nodes of this package."""
    from .. import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    host = Host(folders, deliver)
    host.registry.add(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, python_module=f"custom_nodes.{pack_name()}")
    return host


def pack_name() -> str:
    """The name under which the editor knows this package: that of its folder, as in ComfyUI."""
    return __name__.split(".")[-3]
