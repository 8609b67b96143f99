"""The hub: whether it can be asked, found out in seconds where its own client tries for half a minute; its errors."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from layerprobe.errors import NotAvailableError, UnknownNameError, first_line

SECONDS = 3.0


def offline_reason(offline: bool) -> str | None:
    """Why the network must not be asked, in words; None when it may be."""
    if offline:
        return "offline mode is on (--offline)"
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"offline mode is on ({variable}={os.environ[variable]})"
    return None


@contextlib.contextmanager
def hub_errors(repository: str, doing: str, *, revision: str | None = None, near: str = "") -> Iterator[None]:
    """What the hub's client raises, as one line without its traces; `near` are names like one that is not there."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise UnknownNameError(
            f"'{repository}' is no repository of the hub: it is written OWNER/NAME"
        ) from error
    except GatedRepoError as error:
        raise NotAvailableError(
            f"'{repository}' is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UnknownNameError(f"'{repository}' has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise UnknownNameError(
            f"the hub has no '{repository}', or you may not see it (`hf auth login`){near}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise NotAvailableError(
            f"'{repository}' is not cached and the hub cannot be reached (or offline mode is on)"
        ) from error
    except LocalTokenNotFoundError as error:
        raise NotAvailableError(f"cannot {doing}: log in first with `hf auth login`") from error
    except OfflineModeIsEnabled as error:
        raise NotAvailableError(f"cannot {doing}: offline mode is on (HF_HUB_OFFLINE)") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "; log in with `hf auth login`, with the right to write" if status in (401, 403) else ""
        raise NotAvailableError(f"cannot {doing}: the hub answers {status}{hint}") from error
    except (ConnectionError, TimeoutError) as error:
        raise NotAvailableError(f"cannot {doing}: the hub cannot be reached") from error
    except Exception as error:
        # Of the package that the client talks through; which one that is differs between its versions.
        if type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise NotAvailableError(
                f"cannot {doing}: the hub cannot be reached ({type(error).__name__})"
            ) from error
        if isinstance(error, OSError):
            raise NotAvailableError(f"cannot {doing}: {first_line(error)}") from error
        raise


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
