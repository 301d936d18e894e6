"""Rollouts from OpenAI-compatible servers (vLLM, SGLang): images as data URLs, retries, many servers.

One HTTP request per rollout, each with its own seed. Asked for n choices, SGLang's deterministic mode gives all of them
one seed and so one text, some servers give fewer, and none says how many tokens each has; for a single choice
``usage.completion_tokens`` does. Servers cache prompts, and a problem has a home server: the prompt is computed once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging as python_logging
import os
import queue
import random
import re
import threading
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from mmprm_jax import interruption
from mmprm_jax.data.images import open_image, orientation
from mmprm_jax.data.prompts import policy_template
from mmprm_jax.records import Failure, Problem, Request, Rollout, UserError
from mmprm_jax.rollout.chat import Answer, Unusable, chat_body, limit_tiles, read_answer, server_kind
from mmprm_jax.rollout.reading import Reader
from mmprm_jax.rollout.rollouts import Verify, request_key
from mmprm_jax.rollout.sampling import Sampling

MAX_ANSWER = 64 * 2**20  # bytes
MAX_MESSAGE = 300  # characters of a server's own words in an error
CONNECT_TIMEOUT = 10.0  # seconds
FAILURES_IN_A_ROW = 3  # then a server rests
PATIENCE = 900.0  # seconds for which all servers may fail
LOG_EVERY = 60.0  # seconds between two warnings of a server that fails
UNUSABLE = 2  # answers to one request that cannot be used: then this rollout is given up
_HINT = "; are the address (most end in /v1), the model's name and the variable OPENAI_API_KEY right?"

Sample = tuple[str, int]  # text, number of tokens
_LOST: Sample = ("", 0)  # of a rollout whose answers could not be used


class _Retry(Exception):
    """An attempt failed in a way that may pass. ``unusable``: there was an answer, and it is no rollout."""

    def __init__(self, reason: str, unusable: Unusable | None = None):
        super().__init__(reason)
        self.unusable = unusable


@dataclasses.dataclass(eq=False)
class _Server:
    url: str
    in_flight: int = 0
    failures: int = 0  # in a row
    paused_until: float = 0.0  # time.monotonic(), as below
    failing_since: float = 0.0  # 0: not failing
    warned_at: float = float("-inf")
    reason: str = ""  # of the last failure
    kind: str | None = None  # of ``chat.TILES``, "": another; None: not known yet
    asking: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    guesses: bool = False  # it does not say how many tokens its answers have


def image_url(path: epath.PathLike) -> str:
    """The image in a file as a data URL with the pixels of ``open_image``. Raises UserError as that does."""
    image, data = open_image(path), epath.Path(path).read_bytes()
    with Image.open(io.BytesIO(data)) as raw:
        kind = raw.format or ""
        plain = kind in ("PNG", "JPEG") and raw.mode in ("RGB", "L") and not raw.has_transparency_data
        plain = plain and orientation(raw) == 1
    if not plain:  # a server might do otherwise with transparency, 16 bits or what EXIF says
        kind, encoded = "PNG", io.BytesIO()
        image.save(encoded, kind)
        data = encoded.getvalue()
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(data).decode()}"


def _seed(key: np.ndarray, rollout: int) -> int:
    """31 bits for one rollout of the request with that key (uint32 [2])."""
    digest = hashlib.blake2b(key.tobytes() + rollout.to_bytes(4, "little"), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def _server(url: str) -> _Server:
    with contextlib.suppress(httpx2.InvalidURL):
        base = httpx2.URL(url)
        if base.scheme in ("http", "https") and base.host and not (base.userinfo or base.query or base.fragment):
            return _Server(url.rstrip("/"))
    shown = re.sub(r"//.*@", "//***@", url)
    raise UserError(f"{shown!r} is no server's address such as http://host:8000/v1 (a key goes into OPENAI_API_KEY)")


class RemoteSampler:
    """Samples from servers and verifies the final answers (``records.Sampler``). Close it, or use it in ``with``.

    Requests are asyncio tasks in one thread; ``collect`` verifies in the caller's. A rollout that is refused, or still
    fails after ``max_attempts``, makes a Failure of its request. One whose answers, UNUSABLE of them, cannot be used is
    an empty one; a request that loses more than half of its rollouts so is a Failure. ``rollouts`` and ``tokens`` count
    what was collected, ``unusable`` the rollouts that were lost.
    """

    def __init__(
        self,
        servers: Sequence[str],
        model: str,
        folder: epath.PathLike,
        seed: int,
        purpose: str,
        verify: Verify,
        sampling: Sampling,
        template: str = "continue",
        concurrency: int = 64,
        timeout: float = 600.0,
        max_attempts: int = 8,
        backoff: float = 1.0,
        pause: float = 60.0,
        max_tiles: int = 0,
        reader: Reader | None = None,
    ):
        """Raises UserError for bad addresses, an unknown template and an OPENAI_API_KEY that no header can hold.

        servers: base URLs such as http://host:8000/v1, all of the same model. folder: where image paths start. verify:
        is each of these (answer or None, gold, grading) right? template: see ``chat_body``. concurrency: HTTP requests
        under way per server. timeout: seconds for a whole answer. backoff: seconds before the first retry, doubled for
        each further one, with jitter. pause: the longest wait in seconds: of a retry, of a Retry-After, and of a server
        that failed FAILURES_IN_A_ROW times. max_tiles: of an image, for servers that can be told; 0: none is told.
        reader: reads the answers; default: by their tags.
        """
        self._servers = [_server(url) for url in servers]
        if not self._servers:
            raise UserError("remote rollouts need at least one server's address such as http://host:8000/v1")
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that a key cannot have; set it again, or unset it")
        policy_template("plain" if template == "continue" else template)
        self._model, self._sampling, self._template = model, sampling, template
        self._folder, self._seed, self._purpose, self._verify = epath.Path(folder), seed, purpose, verify
        self.reader = reader or Reader()
        self._concurrency, self._timeout, self._max_attempts = concurrency, timeout, max_attempts
        self._backoff, self._pause, self._max_tiles = backoff, pause, max_tiles
        self.rollouts = self.tokens = self.retries = self.unusable = self._outstanding = 0
        self._ready: queue.Queue[tuple[Request | None, list[Sample] | Failure | Exception]] = queue.Queue()
        self._warned_at = float("-inf")
        self._images: dict[str, asyncio.Task[list[str]]] = {}  # by problem id
        self._freed = asyncio.Event()  # set, and replaced, when a place at a server becomes free
        self._gate = asyncio.Semaphore(concurrency * len(self._servers))  # first come, first served
        python_logging.getLogger("httpx2").setLevel(python_logging.WARNING)  # otherwise a line per request
        self._client = httpx2.AsyncClient(
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            timeout=httpx2.Timeout(None, connect=min(CONNECT_TIMEOUT, timeout)),  # _post times the whole
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=2.0),  # before the server closes it (5 s)
        )
        self._loop, self._group = asyncio.new_event_loop(), asyncio.TaskGroup()
        self._main = self._loop.create_task(self._run())
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main,), daemon=True)
        self._thread.start()

    def __enter__(self) -> RemoteSampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what is under way; afterwards no thread and no connection is left."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()
        self._loop.close()
        self._ready.put((None, RuntimeError("the sampler was closed while requests were outstanding")))

    def submit(self, requests: Sequence[Request]) -> None:
        """Takes requests on; returns at once."""
        for request in requests:
            self._loop.call_soon_threadsafe(self._begin, request)
            self._outstanding += 1

    def collect(self) -> list[tuple[Request, tuple[Rollout, ...] | Failure]]:
        """The answers that are ready, each request once; waits until there is one. Empty: nothing is outstanding.

        Raises UserError when no server has answered for PATIENCE; Interrupted.
        """
        ready: list[tuple[Request, list[Sample] | Failure]] = []
        while self._outstanding and not (ready and self._ready.empty()):
            try:
                request, outcome = self._ready.get(timeout=interruption.POLL)
            except queue.Empty:
                interruption.check()
                continue
            if isinstance(outcome, Exception):
                raise outcome
            assert request is not None
            ready.append((request, outcome))
            self._outstanding -= 1
        done = [(*sample, request) for request, outcome in ready if isinstance(outcome, list) for sample in outcome]
        read = [self.reader.read(request, text) for text, _, request in done]
        pairs = zip(read, done, strict=True)
        right = self._verify([(answer, r.problem.answer, r.problem.grading) for (_, answer), (_, _, r) in pairs])
        verified = [Rollout(s, bool(ok), n) for (s, _), (_, n, _), ok in zip(read, done, right, strict=True)]
        self.rollouts += len(verified)
        self.tokens += sum(rollout.n_tokens for rollout in verified)
        rest = iter(verified)
        return [(r, o if isinstance(o, Failure) else tuple(itertools.islice(rest, len(o)))) for r, o in ready]

    def release(self, problem_id: str) -> None:
        """Nothing more will be asked of this problem: its images are forgotten."""
        self._loop.call_soon_threadsafe(self._images.pop, problem_id, None)

    # What follows runs in the loop's thread.

    def _begin(self, request: Request) -> None:
        self._group.create_task(self._answer(request))

    async def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async with self._group:  # holds the tasks of the requests, and cancels them when it is cancelled
                await asyncio.Event().wait()  # until close()
        await self._client.aclose()
        await self._loop.shutdown_default_executor()

    async def _answer(self, request: Request) -> None:
        outcome: list[Any] | Failure | Exception
        try:
            async with asyncio.TaskGroup() as group:  # one rollout given up ends the others
                key, images = request_key(self._seed, self._purpose, request), await self._read(request.problem)
                tasks = [group.create_task(self._sample(request, images, _seed(key, i))) for i in range(request.n)]
            outcome = [task.result() for task in tasks]
            lost = [reason for _, reason in outcome if reason]
            if 2 * len(lost) > len(tasks):  # no estimate can be made of what is left
                outcome = Failure(lost[0])
            else:
                outcome = [sample for sample, _ in outcome]
                if lost:
                    self.unusable += len(lost)
                    self._warn_unusable(lost[0])
        except* UserError as errors:
            outcome = Failure(str(errors.exceptions[0]))
        except* Exception as errors:  # a bug here: collect raises it, lest the caller wait for ever
            outcome = errors
        self._ready.put((request, outcome))

    async def _read(self, problem: Problem) -> Sequence[str]:
        if not problem.images:
            return ()
        if problem.id not in self._images:
            paths = [self._folder / name for name in problem.images]
            reading = asyncio.to_thread(lambda: [image_url(path) for path in paths])
            self._images[problem.id] = self._loop.create_task(reading)
        return await self._images[problem.id]

    async def _sample(self, request: Request, images: Sequence[str], seed: int) -> tuple[Sample, str]:
        """One rollout, and why it is lost, if it is. Raises UserError when it is refused and after the last attempt."""
        home = self._servers[zlib.crc32(request.problem.id.encode()) % len(self._servers)]
        server, reason, unusable = home, "", 0
        tried: _Server | None = None
        async with self._gate:
            body = chat_body(self._model, self._sampling, self._template, request, images, seed, self.reader.steps)
            for attempt in range(self._max_attempts):
                if attempt:
                    self.retries += 1
                    await asyncio.sleep(min(self._pause, self._backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1))
                try:
                    async with self._acquire(home, avoid=tried) as server:
                        tried = server
                        kind = await self._kind(server) if images and self._max_tiles else ""
                        data = json.dumps(limit_tiles(body, kind, self._max_tiles)).encode()
                        return self._rollout(server, body, await self._post(server, data)), ""
                except _Retry as error:
                    reason = self._redact(str(error))
                    self._note_failure(server, reason)
                    if error.unusable is None:
                        continue
                    unusable += 1
                    if unusable == UNUSABLE:
                        if error.unusable.answer is not None:  # broken off again: it is what it is
                            return self._rollout(server, body, error.unusable.answer), ""
                        return _LOST, f"{server.url}: {reason}; given up after {unusable} such answers"
        raise UserError(f"{server.url}: {reason}; given up after {self._max_attempts} attempts")

    def _rollout(self, server: _Server, body: dict[str, Any], answer: Answer) -> Sample:
        server.failures = server.failing_since = 0
        if not (answer.counted or server.guesses):
            server.guesses = True
            logging.warning("%s does not count tokens: a quarter of an answer's bytes is taken for them", server.url)
        last, text = body["messages"][-1], answer.text
        if last["role"] == "assistant":  # some servers repeat what they were to continue
            text = text.removeprefix(last["content"])
        return text, answer.n_tokens

    def _warn_unusable(self, reason: str) -> None:
        """At most once in LOG_EVERY seconds."""
        if time.monotonic() - self._warned_at >= LOG_EVERY:
            self._warned_at = time.monotonic()
            logging.warning("%d rollouts so far are lost, and count as wrong: %s", self.unusable, reason)

    async def _kind(self, server: _Server) -> str:
        """The server's kind, asked for once; warns of one that cannot be told how many tiles an image may have."""
        async with server.asking:
            if server.kind is None:
                status, data, _ = await self._exchange(
                    "GET", f"{server.url}/models", min(self._timeout, 3 * CONNECT_TIMEOUT)
                )
                if status in (408, 429, 502, 503, 504):
                    raise _Retry(f"HTTP {status} of {server.url}/models")
                server.kind = server_kind(data) if status == 200 else ""
                if not server.kind:
                    logging.warning(
                        "%s cannot be told that an image may have %d tiles (max_tiles) and cuts as it was started:"
                        " it does not say that it is vLLM, SGLang or LMDeploy", server.url, self._max_tiles,
                    )  # fmt: skip
        return server.kind

    def _note_failure(self, server: _Server, reason: str) -> None:
        """A server that goes on failing is paused. When all have failed for so long, ``collect`` raises UserError."""
        now = time.monotonic()
        server.failures += 1
        server.failing_since, server.reason = server.failing_since or now, reason
        if server.failures < FAILURES_IN_A_ROW:
            return
        server.paused_until = now + self._pause
        if now - server.warned_at >= LOG_EVERY:
            logging.warning("%s is paused for %g s: %s", server.url, self._pause, reason)
            server.warned_at = now
        if all(s.failing_since and now - s.failing_since > PATIENCE for s in self._servers):
            reasons = "; ".join(f"{s.url}: {s.reason}" for s in self._servers)
            self._ready.put((None, UserError(f"no answer from any server for {PATIENCE:g} s ({reasons})")))

    @contextlib.asynccontextmanager
    async def _acquire(self, home: _Server, avoid: _Server | None) -> AsyncIterator[_Server]:
        """A free slot at a server that is not paused: not ``avoid`` if there is another, ``home`` if it has room."""
        while True:
            now, freed = time.monotonic(), self._freed
            awake = [s for s in self._servers if s.paused_until <= now]
            free = [s for s in awake if s.in_flight < self._concurrency and (s is not avoid or len(awake) == 1)]
            if free:
                break
            wake = min((s.paused_until - now for s in self._servers if s.paused_until > now), default=None)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(freed.wait(), wake)
        server = min(free, key=lambda s: (s is not home, s.in_flight))
        server.in_flight += 1
        try:
            yield server
        finally:
            server.in_flight -= 1
            self._freed.set()
            self._freed = asyncio.Event()

    async def _exchange(self, method: str, url: str, timeout: float, body: bytes = b"") -> tuple[int, bytes, Any]:
        """Status, content and headers of a server's response. Raises _Retry."""
        data = bytearray()
        try:
            async with asyncio.timeout(timeout):
                async with self._client.stream(method, url, content=body) as response:
                    async for chunk in response.aiter_bytes():
                        data += chunk
                        if len(data) > MAX_ANSWER:
                            reason = f"the answer is larger than {MAX_ANSWER} bytes"
                            raise _Retry(reason, Unusable(reason))
        except TimeoutError:
            raise _Retry(f"no whole answer in {timeout:g} s") from None
        except (httpx2.HTTPError, OSError) as error:
            raise _Retry(f"{type(error).__name__} {error}") from None
        return response.status_code, bytes(data), response.headers

    async def _post(self, server: _Server, body: bytes) -> Answer:
        """One answer. Raises _Retry, or UserError when the server refuses the request."""
        status, data, headers = await self._exchange("POST", f"{server.url}/chat/completions", self._timeout, body)
        if status == 200:
            try:
                return read_answer(data)
            except Unusable as error:
                raise _Retry(str(error), error) from None
        reason = f"HTTP {status}: {data.decode(errors='replace')}"
        if status in (408, 409, 429) or status >= 500:
            with contextlib.suppress(ValueError):  # it may be a date: then the usual backoff has to do
                wait = min(float(headers.get("Retry-After", "0")), self._pause)
                server.paused_until = max(server.paused_until, time.monotonic() + wait)
            raise _Retry(reason)
        raise UserError(f"{server.url}: {self._redact(reason)}{_HINT if status in (401, 403, 404) else ''}")

    def _redact(self, text: str) -> str:
        """A server's words, fit for an error: without the key, on one line, of bounded length."""
        text = text.replace(self._key, "***") if self._key else text
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"
