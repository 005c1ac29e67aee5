"""`/v1/responses`: OpenAI's newer API for text, reasoning and tool calls, on top of chats.

A response is a chat whose input and output are lists of items. Nothing is stored: whoever goes on
with a conversation sends it whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from dspark.serving.context import Its
from dspark.serving.openai.chat import chat_job
from dspark.serving.openai.errors import ApiError
from dspark.serving.openai.response_fields import ResponseFields, TextOptions
from dspark.serving.openai.streaming import Choice, reply, write_json

router = APIRouter(tags=["completions"])


@router.post("/v1/responses")
async def responses(fields: ResponseFields, http: HttpRequest, context: Its) -> Response:
    """Answer a conversation."""
    asked = fields.as_chat()
    framing = ResponseFraming(http.state.request_id, context.settings.model_name, fields)
    job = await chat_job(asked, framing, http, context, fields.ignored())
    return await reply(job, context, http.receive)


class ResponseFraming:
    """A response as one body, or as the events of its items.

    Args:
        request_id: of the HTTP request.
        model: the model's name.
        fields: what was asked, which a response repeats.
    """

    def __init__(self, request_id: str, model: str, fields: ResponseFields) -> None:
        self._id = request_id
        self._fields = fields
        self._model = model
        self._created_s = int(time.time())
        self._sequence = 0
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._reason = "stop"

    def full(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of a whole reply."""
        [choice] = choices
        message, found = choice["message"], list[dict[str, Any]]()
        if message.get("reasoning_content"):
            self._add(found, "reasoning", message["reasoning_content"])
        if message["content"] or not message.get("tool_calls"):
            self._add(found, "message", message["content"] or "", choice["logprobs"])
        for call in message.get("tool_calls", ()):
            found.append(self._call_item(len(found), call, "completed"))
        self._items, self._reason = found, choice["finish_reason"]
        return self._response(usage)

    def begin(self) -> str:
        """The events of a response that has begun."""
        begun = self._response(None)
        return "".join(
            self._event(f"response.{name}", response=begun) for name in ("created", "in_progress")
        )

    def event(self, choice: Choice) -> str:
        """The events of a chat's delta."""
        delta, events = choice["delta"], list[str]()
        if choice["finish_reason"] is not None:
            self._reason = choice["finish_reason"]
        for kind, name in (("reasoning", "reasoning_content"), ("message", "content")):
            if delta.get(name) or (kind == "message" and choice["logprobs"]):
                events.append(self._text_delta(kind, delta.get(name) or "", choice["logprobs"]))
        for call in delta.get("tool_calls", ()):
            events += [self._close(), self._call_events(call)]
        return "".join(events)

    def end(self, usage: dict[str, Any]) -> str:
        """The events that end a response."""
        events = [self._close()]
        if not self._items:  # an empty answer is an item too
            events += [self._text_delta("message", "", None), self._close()]
        response = self._response(usage)
        return "".join([*events, self._event(f"response.{response['status']}", response=response)])

    def error(self, error: ApiError) -> str:
        """The error as an event."""
        return self._event(
            "error", message=str(error), code=error.code or "error", param=error.param
        )

    def _response(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        """The response object; without usage, one that has only begun."""
        fields, why = self._fields, {"length": "max_output_tokens", "timeout": "timeout"}
        status = "in_progress"
        if usage is not None:
            status = "incomplete" if self._reason in why else "completed"
        given = fields.model_dump(
            include={"instructions", "max_output_tokens", "metadata", "user", "temperature"}
        )
        chosen = fields.tool_choice if fields.tool_choice is not None else "auto"
        text = fields.text or TextOptions()
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": why[self._reason]} if status == "incomplete" else None,
            "model": self._model,
            "output": list(self._items) if usage is not None else [],
            **given,
            "metadata": given["metadata"] or {},
            "temperature": fields.temperature or 0.0,
            "top_p": 1.0 if fields.top_p is None else fields.top_p,
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": fields.reasoning.effort if fields.reasoning else None,
                "summary": None,
            },
            "store": False,
            "text": text.model_dump(by_alias=True, exclude_none=True)
            if text.format
            else {"format": {"type": "text"}},
            "tool_choice": chosen,
            "tools": [tool.model_dump() for tool in fields.tools or ()],
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }

    def _item_id(self, prefix: str, index: int) -> str:
        return f"{prefix}_{self._id}_{index}"

    def _text_item(
        self, kind: str, index: int, text: str, logprobs: Sequence[Any], status: str
    ) -> dict[str, Any]:
        """An item of kind `message` or `reasoning`; without parts while it is in progress."""
        done = status != "in_progress"
        if kind == "reasoning":
            return {
                "id": self._item_id("rs", index),
                "type": "reasoning",
                "summary": [],
                "content": [_part(kind, text, ())] if done else [],
                "status": status,
            }
        return {
            "id": self._item_id("msg", index),
            "type": "message",
            "role": "assistant",
            "content": [_part(kind, text, logprobs)] if done else [],
            "status": status,
        }

    def _add(
        self,
        items: list[dict[str, Any]],
        kind: str,
        text: str,
        logprobs: Mapping[str, Any] | None = None,
    ) -> None:
        content = logprobs["content"] if logprobs else []
        items.append(self._text_item(kind, len(items), text, content, "completed"))

    def _call_item(self, index: int, call: Mapping[str, Any], status: str) -> dict[str, Any]:
        return {
            "id": self._item_id("fc", index),
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"] if status == "completed" else "",
            "status": status,
        }

    def _text_delta(self, kind: str, text: str, logprobs: Mapping[str, Any] | None) -> str:
        """The events of further text; those that open its item included."""
        events = list[str]()
        if self._open is None or self._open["kind"] != kind:
            events.append(self._close())
            index = len(self._items)
            item = self._text_item(kind, index, "", (), "in_progress")
            self._open = {"kind": kind, "id": item["id"], "text": "", "logprobs": []}
            events.append(self._event("response.output_item.added", output_index=index, item=item))
            part = _part(kind, "", ())
            events.append(self._part_event("response.content_part.added", part=part))
        found = logprobs["content"] if logprobs else []
        self._open["text"] += text
        self._open["logprobs"] += found
        more = {"logprobs": found} if kind == "message" else {}
        events.append(self._part_event(f"response.{_NAMES[kind]}.delta", delta=text, **more))
        return "".join(events)

    def _close(self) -> str:
        """The events that end the open item, if one is."""
        if self._open is None:
            return ""
        kind, text, found = (self._open[name] for name in ("kind", "text", "logprobs"))
        more = {"logprobs": found} if kind == "message" else {}
        events = [
            self._part_event(f"response.{_NAMES[kind]}.done", text=text, **more),
            self._part_event("response.content_part.done", part=_part(kind, text, found)),
        ]
        index = len(self._items)
        self._items.append(self._text_item(kind, index, text, found, "completed"))
        events.append(
            self._event("response.output_item.done", output_index=index, item=self._items[-1])
        )
        self._open = None
        return "".join(events)

    def _call_events(self, call: Mapping[str, Any]) -> str:
        """The events of a call, which comes whole."""
        index = len(self._items)
        item, place = self._call_item(index, call, "completed"), {"output_index": index}
        begun = self._call_item(index, call, "in_progress")
        self._items.append(item)
        arguments, place_in = item["arguments"], {"item_id": item["id"], **place}
        name = "response.function_call_arguments"
        return "".join(
            (
                self._event("response.output_item.added", item=begun, **place),
                self._event(f"{name}.delta", delta=arguments, **place_in),
                self._event(f"{name}.done", arguments=arguments, name=item["name"], **place_in),
                self._event("response.output_item.done", item=item, **place),
            )
        )

    def _part_event(self, kind: str, **body: Any) -> str:
        assert self._open is not None, "parts belong to the open item"
        place = {"item_id": self._open["id"], "output_index": len(self._items), "content_index": 0}
        return self._event(kind, **place, **body)

    def _event(self, kind: str, **body: Any) -> str:
        self._sequence += 1
        written = write_json({"type": kind, "sequence_number": self._sequence - 1, **body})
        return f"event: {kind}\ndata: {written}\n\n"


_NAMES = {"message": "output_text", "reasoning": "reasoning_text"}


def _part(kind: str, text: str, logprobs: Sequence[Any]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's usage under the names of responses; cached and reasoning tokens are not counted."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "dspark": usage["dspark"],
    }
