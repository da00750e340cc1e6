"""The web application of the front: OpenAI-style requests come in, and go on to the server under an adapter's name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.requests import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from twin_bench.errors import InputError, first_line, nearest, shown
from twin_bench.export.served import ROUTED, SHARED
from twin_bench.front.answers import MalformedError, error_body, joined, model_list
from twin_bench.front.metrics import Metrics
from twin_bench.front.requests import choices_each, encoded, read_body, template_options
from twin_bench.front.routing import PromptRouter

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ADAPTER_HEADER = "x-twin-adapter"
"""The header of an answer that names the models which gave it."""
HEALTH = 5.0
"""The seconds in which the server must say that it is well."""
LARGEST = 2**23
"""The bytes of a request's body. A million tokens are 4 million as text, and 7 million as ids.

Python reads JSON without letting other threads run: all requests wait for a large body.
"""
LONGEST_NAME = 256
"""The characters of a model's name."""
PASSED = (b"authorization", b"x-request-id")
"""The headers of a request that go on to the server."""
SENT = {b"accept-encoding": b"identity", b"content-type": b"application/json"}
"""The headers that the front gives each request to the server."""


class Front:
    """The handlers of the front. `client` speaks to the server, and has its address and time-outs."""

    def __init__(self, router: PromptRouter, client: httpx.AsyncClient) -> None:
        self.metrics = Metrics()
        self._router = router
        self._client = client
        self._names = [*router.served.adapters, SHARED]

    async def completions(self, request: Request) -> Response:
        """Answer POST /v1/completions. Prompts of one request may have several adapters, unless it is streamed."""
        return await self._answered(request, COMPLETIONS)

    async def chat(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        return await self._answered(request, CHAT)

    async def models(self) -> Response:
        """Answer GET /v1/models: the twin, then the adapters and the shared expert."""
        return JSONResponse(model_list([ROUTED, *self._names]))

    async def health(self) -> Response:
        """Answer GET /health: 200 where the server says that it is well, else 503 with the reason."""
        try:
            status = (await self._client.get("/health", timeout=HEALTH)).status_code
            reason = f"the server's /health says {status}"
        except httpx.HTTPError as error:
            status, reason = 503, f"the server can't be reached ({_said(error)})"
        if status == 200:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": reason}, status_code=503)

    async def report(self) -> Response:
        """Answer GET /metrics."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._client.aclose()

    async def _answered(self, request: Request, path: str) -> Response:
        """Route a request and forward it; an error becomes an answer in the form of OpenAI's API."""
        with self.metrics.running():
            try:
                body = read_body(await _content(request))
                if path == CHAT:
                    template_options(body)
                adapters = await self._adapters(body, path)
                headers = {name: value for name, value in request.headers.raw if name in PASSED} | SENT
                if len(set(adapters)) > 1:
                    return await self._split(body, adapters, headers)
                return await self._forwarded(path, body, adapters[0], headers)
            except InputError as error:
                self.metrics.failed("request")
                status = error.status if isinstance(error, _RefusedError) else 400
                return JSONResponse(error_body(str(error), "invalid_request_error", status), status_code=status)
            except httpx.TimeoutException:
                self.metrics.failed("timeout")
                message = "the server behind the front gave no answer in time; ask for less, or raise --timeout"
                return JSONResponse(error_body(message, "timeout_error", 504), status_code=504)
            except httpx.HTTPError as error:
                self.metrics.failed("unreachable")
                message = f"the server behind the front can't be reached ({_said(error)}); is vLLM up?"
                return JSONResponse(error_body(message, "upstream_error", 502), status_code=502)
            except MalformedError as error:
                self.metrics.failed("malformed")
                message = f"the server behind the front gave no completion ({error}); is it vLLM?"
                return JSONResponse(error_body(message, "upstream_error", 502), status_code=502)

    async def _adapters(self, body: Mapping[str, Any], path: str) -> list[str]:
        """Return the name of the model that answers each prompt. A request may name one itself."""
        model = body.get("model", ROUTED)
        if not isinstance(model, str) or len(model) > LONGEST_NAME:
            raise InputError(f"model: expected a name of at most {LONGEST_NAME} characters, not {shown(model)}")
        if model in self._names:
            return [model]
        if model != ROUTED:
            known = nearest(model, [ROUTED, *self._names])
            raise _RefusedError(f"model {shown(model)} is not served{known}", 404)

        def route() -> list[str]:
            prompts = self._router.completion_prompts(body) if path == COMPLETIONS else [self._router.chat_prompt(body)]
            return self._router.adapters(prompts)

        with self.metrics.timed("routing"):
            return await run_in_threadpool(route)

    async def _forwarded(
        self, path: str, body: Mapping[str, Any], adapter: str, headers: Mapping[bytes, bytes]
    ) -> Response:
        """Return the server's answer as it is, with the adapter's name in a header."""
        content = encoded({**body, "model": adapter})
        if body.get("stream"):
            return await self._streamed(path, content, adapter, headers)
        return _passed(await self._sent(path, content, adapter, headers), adapter)

    async def _sent(self, path: str, content: bytes, adapter: str, headers: Mapping[bytes, bytes]) -> httpx.Response:
        with self.metrics.timed("server"):
            answer = await self._client.post(path, content=content, headers=headers)
        self.metrics.answered(adapter, answer.status_code)
        return answer

    async def _streamed(self, path: str, content: bytes, adapter: str, headers: Mapping[bytes, bytes]) -> Response:
        """Return the server's events as they come. The request is being answered until the last one is passed on."""
        async with AsyncExitStack() as held:
            held.enter_context(self.metrics.timed("server"))
            asked = self._client.build_request("POST", path, content=content, headers=headers)
            answer = await self._client.send(asked, stream=True)
            held.push_async_callback(answer.aclose)
            self.metrics.answered(adapter, answer.status_code)
            if answer.status_code != 200:
                await answer.aread()
                return _passed(answer, adapter)
            held.enter_context(self.metrics.running())
            kind = answer.headers.get("content-type", "text/event-stream")
            events, told = self._events(answer), {ADAPTER_HEADER: adapter}
            return _Stream(events, held.pop_all(), media_type=kind, headers=told)

    async def _events(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        """Yield the parts of a stream. One that breaks ends with an event that says so."""
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
        except httpx.HTTPError as error:
            self.metrics.failed("broken_stream")
            told = error_body(f"the server's stream broke off ({_said(error)})", "upstream_error", 502)
            yield f"\n\ndata: {json.dumps(told)}\n\n".encode()  # it may have broken off inside an event

    async def _split(
        self, body: Mapping[str, Any], adapters: Sequence[str], headers: Mapping[bytes, bytes]
    ) -> Response:
        """Return one completion of prompts that several adapters answer."""
        if body.get("stream"):
            raise InputError("prompt: these prompts go to several adapters, and one stream has one; send them apart")
        each = choices_each(body)
        groups = {name: [i for i, own in enumerate(adapters) if own == name] for name in dict.fromkeys(adapters)}
        contents = {
            name: encoded({**body, "model": name, "prompt": [body["prompt"][place] for place in places]})
            for name, places in groups.items()
        }
        asked = [
            asyncio.ensure_future(self._sent(COMPLETIONS, content, name, headers)) for name, content in contents.items()
        ]
        try:
            answers = await asyncio.gather(*asked)
        finally:
            for one in asked:  # where one fails, nobody waits for the others
                one.cancel()
        for answer, name in zip(answers, groups, strict=True):
            if answer.status_code != 200:
                return _passed(answer, name)
        parts = [(places, answer.content) for places, answer in zip(groups.values(), answers, strict=True)]
        content = encoded(joined(parts, each, ROUTED))
        return Response(content, media_type="application/json", headers={ADAPTER_HEADER: ",".join(groups)})


class _RefusedError(InputError):
    """A request that is refused with a status of its own."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Stream(StreamingResponse):
    """A stream, and what is held until it has ended, also where the client has gone before its first part."""

    def __init__(self, events: AsyncIterator[bytes], held: AsyncExitStack, **options: Any) -> None:
        super().__init__(events, **options)
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream."""
        async with self._held:
            await super().__call__(scope, receive, send)


def create_app(router: PromptRouter, client: httpx.AsyncClient) -> FastAPI:
    """Return the web application of a front.

    Args:
        router: what chooses an adapter.
        client: the client of the server, with its address as `base_url`. It is closed with the application.
    """
    front = Front(router, client)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await front.close()

    app = FastAPI(title="twin-bench front", lifespan=lifespan)
    for path, handler, method in (
        (COMPLETIONS, front.completions, "POST"),
        (CHAT, front.chat, "POST"),
        ("/v1/models", front.models, "GET"),
        ("/health", front.health, "GET"),
        ("/metrics", front.report, "GET"),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    return app


async def _content(request: Request) -> bytes:
    """Return the bytes of a request's body. InputError where they are too many."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LARGEST:
            raise _RefusedError(f"the body has over {LARGEST} bytes; send fewer prompts in a request", 413)
    return bytes(content)


def _passed(answer: httpx.Response, adapter: str) -> Response:
    kind = answer.headers.get("content-type", "application/json")
    return Response(answer.content, answer.status_code, media_type=kind, headers={ADAPTER_HEADER: adapter})


def _said(error: Exception) -> str:
    return first_line(error) if str(error) else type(error).__name__
