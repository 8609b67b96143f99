"""Whether the hub can be asked at all: found out in seconds, where its own client tries for half a minute."""

from __future__ import annotations

import functools
import socket
import urllib.request
from urllib.parse import urlsplit

SECONDS = 3.0


def hub_is_out_of_reach() -> bool:
    """Whether the hub's machine takes no connection; False behind a proxy, where only asking tells."""
    from huggingface_hub import constants

    return _is_out_of_reach(constants.ENDPOINT)


@functools.cache
def _is_out_of_reach(endpoint: str) -> bool:
    address = urlsplit(endpoint)
    if address.hostname is None or urllib.request.getproxies().get(address.scheme):
        return False
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
    except OSError:
        return True
    return False
