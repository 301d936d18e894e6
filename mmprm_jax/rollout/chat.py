"""A rollout as a chat completion of an OpenAI-compatible server: the request's JSON, and what an answer amounts to."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmprm_jax.data.prompts import asking, policy_template
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.tokenizer import Segment
from mmprm_jax.records import Request
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.servers import message_text

IN_IMAGE, IN_BODY = "in each image_url", "in the body"
# Where a server, by the ``owned_by`` of its models, takes the most tiles that an image is cut into.
TILES = {"vllm": IN_BODY, "sglang": IN_IMAGE, "lmdeploy": IN_IMAGE}
_GIVEN_UP = ("abort", "error", "cancelled")  # finish reasons of a server that broke off, not of the policy
_BYTES_PER_TOKEN = 4  # of a text whose tokens nobody counted


class Unusable(Exception):
    """An answer that is no rollout. ``answer``: what it still says, of one that the server broke off."""

    def __init__(self, reason: str, answer: Answer | None = None):
        super().__init__(reason)
        self.answer = answer


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was sampled. counted: whether the server said how many tokens; otherwise they are a guess by the bytes."""

    text: str
    n_tokens: int
    counted: bool


def _messages(prompt: Sequence[Segment], images: Sequence[str]) -> list[dict[str, Any]]:
    """A template's turns as chat messages, the open one last. A content without an image is a string, not a list."""
    left = iter(images)
    turns: list[list[str]] = []  # per turn the texts between its images, the first one led by the role
    inside = False
    for segment in prompt:
        marker = segment.text if segment.marker else None
        if marker in (tok.TURN_START, tok.TURN_END):
            inside = marker == tok.TURN_START
            turns += [[""]] * inside
        elif marker == tok.IMAGE:
            turns[-1] = [*turns[-1], ""]
        elif inside and marker not in (tok.IMAGE_START, tok.IMAGE_END):
            turns[-1] = [*turns[-1][:-1], turns[-1][-1] + segment.text]
    messages = []
    for head, *rest in turns:
        role, _, text = head.partition("\n")
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for after in rest:
            parts.append({"type": "image_url", "image_url": {"url": next(left)}})
            parts.append({"type": "text", "text": after.removeprefix("\n")})  # servers put that newline themselves
        messages.append({"role": role, "content": [p for p in parts if p.get("text") != ""] if rest else text})
    return messages


def chat_body(
    model: str, sampling: Sampling, template: str, request: Request, images: Sequence[str], seed: int,
    steps: str = "tags",
) -> dict[str, Any]:  # fmt: skip
    """The JSON that asks for one rollout. ``images``: the data URLs of the problem's images.

    template: "continue" (the steps so far open the assistant turn, there is no system message) or the name of a policy
    template. steps: how the policy is to write, as in ``settings.Reading``. Raises UserError for another template and
    when the question's ``<image>`` placeholders do not fit.
    """
    build = asking(policy_template("plain" if template == "continue" else template), steps)
    messages = _messages(build(request.problem.question, request.prefix, [1] * len(images)), images)
    continued = bool(messages[-1]["content"])
    return {  # every setting: one left out would be taken from the model's generation_config.json
        "model": model,
        "messages": messages if continued else messages[:-1],
        "n": 1,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,  # -1: all
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "skip_special_tokens": False,  # <step> is one in some tokenizers
        **({"stop_token_ids": list(sampling.stop)} if sampling.stop else {}),
        **({"continue_final_message": True, "add_generation_prompt": False} if continued else {}),
    }


def limit_tiles(body: dict[str, Any], kind: str, max_tiles: int) -> dict[str, Any]:
    """``body`` with the most tiles of an image, as a server of that ``kind`` (see TILES) is told; others are not."""
    if TILES.get(kind) == IN_BODY:
        return {**body, "mm_processor_kwargs": {"max_dynamic_patch": max_tiles}}
    body = copy.deepcopy(body) if kind in TILES else body
    for message in body["messages"] if kind in TILES else ():
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image_url":
                part["image_url"]["max_dynamic_patch"] = max_tiles
    return body


def server_kind(data: bytes) -> str:
    """Which of TILES a server is by its answer to /models; "" if it does not say, or is another."""
    try:
        owners = {model["owned_by"] for model in json.loads(data)["data"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return next((kind for kind in TILES if kind in owners), "")


def read_answer(data: bytes) -> Answer:
    """What a server's answer amounts to, however it ended: one that ran into a filter or a tool is cut off there.

    Raises Unusable for what is no answer, and for one that the server itself broke off.
    """
    try:
        answer = json.loads(data)
        (choice,) = answer["choices"]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message_text(message)
        usage = answer.get("usage")
        counted = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        shown = " ".join(data[:120].decode(errors="replace").split())
        raise Unusable(
            f"the answer is not JSON with one choice that has a message ({type(error).__name__}: {error}): {shown}"
        ) from None
    text = text.encode(errors="replace").decode()  # a lone surrogate could not be written to a file
    number = counted if isinstance(counted, int | float) and not isinstance(counted, bool) else -1
    known = float(number).is_integer() and bool(text) <= number < 2**31
    found = Answer(text, int(number) if known else -(-len(text.encode()) // _BYTES_PER_TOKEN), known)
    if finish in _GIVEN_UP:
        raise Unusable(f"the server broke off (finish_reason {finish!r})", found)
    return found
