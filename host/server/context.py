"""What all routes of a server share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine import Host
    from ..folders import DataFolders
    from .hub import Hub

MAX_UPLOAD_SIZE = 100 * 1024 * 1024


@dataclass(frozen=True)
class Pack:
    """The files of a node pack that the editor reads; a folder is None where the pack has none of that kind.

    name: the second part of its nodes' `python_module` (`custom_nodes.<name>`). web: scripts and help pages
    (`docs/`). templates: workflows with their thumbnails. locales: `<language>/nodeDefs.json` and the like.
    """

    name: str
    web: Path | None = None
    templates: Path | None = None
    locales: Path | None = None


@dataclass(frozen=True)
class Server:
    """The host, its folders, the connected clients, the packs that it serves, the editor's files (None: no editor)."""

    host: Host
    folders: DataFolders
    hub: Hub
    packs: tuple[Pack, ...] = ()
    frontend: Path | None = None
