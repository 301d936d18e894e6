"""Demonstrations restructured by an OpenAI-compatible server, as the paper did; the rules' version where it fails.

What the server says is taken only if it parses as ``<step>…</step>…<answer>…</answer>`` from end to end and keeps the
final answer. Requests are under way several at a time; the results come in the order of the rows, whatever the timing.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx2

from mmprm_jax.data.prompts import final_answer, split_segments, step_text
from mmprm_jax.data.sources_base import Item, replace_fields
from mmprm_jax.records import UserError
from mmprm_jax.servers import message_text

MAX_ANSWER = 4 * 2**20  # bytes
_TASK = (
    "Rewrite the solution below as reasoning steps, each between <step> and </step>, followed by the final answer"
    " between <answer> and </answer>, and nothing else. Keep every fact, formula and number of the solution; add"
    " nothing that it does not say; one idea per step. The final answer stays exactly: {answer}"
    "\n\nQuestion: {question}\n\nSolution: {solution}"
)


class Rewriter:
    """Rewrites the responses of SFT items. Close it, or use it in ``with``."""

    def __init__(
        self, server: str, model: str, concurrency: int = 16, attempts: int = 4, timeout: float = 300.0,
        backoff: float = 1.0,
    ):  # fmt: skip
        """server: base URL such as http://host:8000/v1; the key is in OPENAI_API_KEY. timeout, backoff: seconds.

        Raises UserError for an address that is none.
        """
        if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", server):
            raise UserError(
                "--rewriter: no server's address such as http://host:8000/v1, with the key in OPENAI_API_KEY"
            )
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(timeout, connect=10.0))
        self._url, self._model = f"{server.rstrip('/')}/chat/completions", model
        self._pool = ThreadPoolExecutor(concurrency, "rewriter")
        self._ahead, self._attempts, self._backoff = 4 * concurrency, attempts, backoff
        self._counts: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Rewriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def figures(self) -> dict[str, int]:
        """How many responses were rewritten, and for how many the rules' version was taken, by reason."""
        return dict(self._counts.most_common())

    def rewrite(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items in order, with the server's response where it may be taken."""
        waiting: collections.deque[tuple[Item, Future[str]]] = collections.deque()

        def next_one() -> Item:
            item, future = waiting.popleft()
            response, outcome = accepted(future.result(), item.record.response)
            self._counts[outcome] += 1
            return dataclasses.replace(item, record=replace_fields(item.record, response=response))

        for item in items:
            waiting.append((item, self._pool.submit(self._ask, item)))
            if len(waiting) >= self._ahead:
                yield next_one()
        while waiting:
            yield next_one()

    def _ask(self, item: Item) -> str:
        """What the server says; "" when it gave no answer."""
        answer = final_answer(split_segments(item.record.response))
        task = _TASK.format(answer=answer, question=item.record.question, solution=item.solution)
        body = {"model": self._model, "messages": [{"role": "user", "content": task}], "temperature": 0, "seed": 0}
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(self._backoff * 2 ** (attempt - 1))
            try:
                status, data = self._post(body)
            except (httpx2.HTTPError, OSError):
                continue
            if status == 200:
                return _content(data)
            if status in (401, 403, 404):
                raise UserError(f"{self._url}: HTTP {status}; are address, model and OPENAI_API_KEY right?")
            if status not in (408, 409, 429) and status < 500:
                return ""
        return ""

    def _post(self, body: dict) -> tuple[int, bytes]:
        data = bytearray()
        with self._client.stream("POST", self._url, json=body) as response:
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_ANSWER:
                    return 413, b""
        return response.status_code, bytes(data)


def _content(data: bytes) -> str:
    try:
        return message_text(json.loads(data)["choices"][0]["message"]).encode(errors="replace").decode()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""


def accepted(said: str, by_rules: str) -> tuple[str, str]:
    """(the response to take, why): what the server said, or the rules' version."""
    if not said.strip():
        return by_rules, "by rules: no answer from the server"
    segments = split_segments(said)
    outside = said
    for segment in segments:
        outside = outside.replace(segment, "", 1)
    if outside.strip() or len(segments) < 2 or any(not step_text(s).strip() for s in segments):
        return by_rules, "by rules: the server's answer does not parse"
    new, old = final_answer(segments), final_answer(split_segments(by_rules))
    if new is None or old is None or _bare(new) != _bare(old):
        return by_rules, "by rules: the server changed the final answer"
    return "".join(segments), "by the server"


def _bare(answer: str) -> str:
    return re.sub(r"[\s$]", "", answer)
