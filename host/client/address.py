"""Where a server is."""

from __future__ import annotations

from urllib.parse import urlsplit

DEFAULT_SERVER = "http://127.0.0.1:8188"


def server_address(text: str) -> str:
    """The address of a server without a slash at its end; `http://` is added where no scheme is given.

    ValueError for what is no address.
    """
    address = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 - a port that is no number is a ValueError
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{text!r} is not the address of a server; expected one such as http://127.0.0.1:8188")
    return address
