"""A stub of vLLM's API in this process, and connections that break."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx


class Stub:
    """What vLLM answers, as an ASGI application: each text names the model and the prompt. It keeps what it was asked.

    `mood` is what goes wrong: `ill` is a server that is not well, and `odd` one whose completions are none.
    """

    def __init__(self, models: list[str]) -> None:
        self.models = models
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.mood = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status, kind, content = await self._answer(scope, receive)
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, scope: Any, receive: Any) -> tuple[int, str, bytes]:
        if scope["path"] == "/health":
            return 503 if self.mood == "ill" else 200, "text/plain", b""
        body = json.loads((await receive())["body"])
        self.asked.append(body)
        self.headers.append({name.decode(): value.decode("latin-1") for name, value in scope["headers"]})
        if body["model"] not in self.models:
            return 404, "application/json", json.dumps({"error": {"message": "no such model"}}).encode()
        if body.get("max_tokens", 1) < 1:
            return 400, "application/json", json.dumps({"error": {"message": "max_tokens must be 1"}}).encode()
        if body.get("stream"):
            events = "".join(f"data: {body['model']} {word}\n\n" for word in ("a", "b", "[DONE]"))
            return 200, "text/event-stream; charset=utf-8", events.encode()
        if self.mood == "odd":
            return 200, "application/json", b'{"choices": [{"text": "no index"}]}'
        return 200, "application/json", json.dumps(self._completion(scope["path"], body)).encode()

    def _completion(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        if path == "/v1/chat/completions":
            message = {"role": "assistant", "content": body["model"]}
            return {"model": body["model"], "choices": [{"index": 0, "message": message}], "usage": usage}
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        each = body.get("n", 1)
        choices = [
            {"index": place * each + number, "text": f"{body['model']}: {prompt} {number}"}
            for place, prompt in enumerate(prompts)
            for number in range(each)
        ]
        return {"id": "x", "model": body["model"], "choices": choices, "usage": usage}


class Broken(httpx.AsyncBaseTransport):
    """A connection to a server that raises an error: at once, or behind the first event of a stream."""

    def __init__(self, error: Exception, *, after_event: bool = False) -> None:
        self._error, self._after_event = error, after_event

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if not self._after_event:
            raise self._error
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=_Events(self._error))


class _Events(httpx.AsyncByteStream):
    def __init__(self, error: Exception) -> None:
        self._error = error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: first\n\n"
        raise self._error


class Waiting(httpx.AsyncBaseTransport):
    """A connection to a server that sends its second event when the first one was `seen`.

    `closed` says whether its answer was closed.
    """

    def __init__(self, seen: asyncio.Event) -> None:
        self._events = _Pair(seen)

    @property
    def closed(self) -> bool:
        return self._events.closed

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=self._events)


class _Pair(httpx.AsyncByteStream):
    def __init__(self, seen: asyncio.Event) -> None:
        self._seen, self.closed = seen, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"data: first\n\n"
        await self._seen.wait()
        yield b"data: second\n\n"

    async def aclose(self) -> None:
        self.closed = True


class Uneven(httpx.AsyncBaseTransport):
    """A connection that raises an error for the first request, and never answers the others. `given_up` counts those.

    `timeouts` are the time-outs of all requests.
    """

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.given_up = 0
        self.timeouts = list[dict[str, float]]()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.timeouts.append(request.extensions["timeout"])
        if len(self.timeouts) == 1:
            await asyncio.sleep(0.01)  # until the others are on their way
            raise self._error
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        raise AssertionError
