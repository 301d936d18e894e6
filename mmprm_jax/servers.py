"""Checks that servers can be reached, before any work is lost on one that cannot."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import httpx2
from absl import logging

from mmprm_jax import interruption
from mmprm_jax.records import UserError

REACH = 20.0  # seconds in which one of the servers must be reached
_ABSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol)


def check_reachable(urls: Sequence[str]) -> None:
    """Raises UserError when none of the servers takes a connection within REACH; warns of the others. Interrupted."""
    if not urls:
        return
    reasons: dict[str, str | None] = dict.fromkeys(urls)  # None: not known yet; "": reached
    until = time.monotonic() + REACH
    for url in reasons:  # a look-up of a name cannot be interrupted: no thread that the process waits for
        threading.Thread(target=_probe, args=(url, reasons, until), daemon=True).start()
    while time.monotonic() < until and ("" not in reasons.values() or None in reasons.values()):
        interruption.sleep(0.05)
    absent = "; ".join(f"{url}: {reason or 'no answer'}" for url, reason in reasons.items() if reason != "")
    if "" not in reasons.values():
        raise UserError(f"no server can be reached ({absent}); are the addresses right, and are the servers running?")
    if absent:
        logging.warning("cannot be reached, the others go on: %s", absent)


def _probe(url: str, reasons: dict[str, str | None], until: float) -> None:
    while reasons[url] != "" and time.monotonic() < until:
        try:
            httpx2.get(url, timeout=httpx2.Timeout(1.0, connect=5.0))
            reasons[url] = ""
        except _ABSENT as error:
            reasons[url] = f"{type(error).__name__} {error}"
            time.sleep(0.5)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError):
            # It took the connection; a wrong address is reported later.
            reasons[url] = ""
