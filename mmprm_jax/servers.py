"""Checks that servers can be reached, before any work is lost on one that cannot; reads the messages they send."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

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


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a chat completion's message: its content, a string or parts of text.

    Where that is empty, what a server's parser took for reasoning (``reasoning_content``, ``reasoning``): a model that
    does not think has its whole answer there. Raises TypeError, AttributeError for what is no message.
    """
    keys = ("content", "reasoning_content", "reasoning")
    return next((text for text in (_text(message.get(key)) for key in keys) if text), "")


def _text(content: Any) -> str:
    """The text of a message's content. Raises TypeError for what is none."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError(f"content is {type(content).__name__}")
    return "".join(_part(part) for part in content)


def _part(part: Any) -> str:
    """The text of a part; a part of another kind (thinking, refusal, a call of a tool) has none."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise TypeError(f"a part of the content is {type(part).__name__}")
    text = part.get("text") if part.get("type", "text") in ("text", "output_text") else ""
    if not isinstance(text, str):
        raise TypeError(f"the text of a part is {type(text).__name__}")
    return text
