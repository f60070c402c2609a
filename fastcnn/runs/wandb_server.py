"""W&B's server: whether it answers, and whether somebody is logged in to it."""

from __future__ import annotations

import contextlib
import netrc
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROBE_SECONDS = 5.0  # for a server to answer at all


def logged_in(settings: Any) -> bool:
    """Return whether wandb's settings hold a key or token for its server."""
    return bool(settings.api_key or settings.identity_token_file or in_netrc(settings.base_url))


def in_netrc(base_url: str) -> bool:
    """Return whether `wandb login` has stored a key for the server."""
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in places:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(Path(place).expanduser()).authenticators(urlsplit(base_url).netloc):
                return True
    return False


def answers(base_url: str) -> bool:
    """Return whether a server answers; wandb itself would take half a minute to give up."""
    try:
        urllib.request.urlopen(base_url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # wandb may know another certificate
    except OSError:
        return False
    return True
