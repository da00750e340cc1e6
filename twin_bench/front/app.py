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
from twin_bench.front.routing import PromptRouter

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ADAPTER_HEADER = "x-twin-adapter"
"""The header of an answer that names the models which gave it."""
HEALTH = 5.0
"""The seconds in which the server must say that it is well."""
LARGEST = 2**25
"""The bytes of a request's body. A prompt of a million tokens has about 4 million."""
PASSED = ("authorization", "x-request-id")
"""The headers of a request that go on to the server."""


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
                body = await _read(request)
                adapters = await self._adapters(body, path)
                headers = {name: request.headers[name] for name in PASSED if name in request.headers}
                if len(set(adapters)) > 1:
                    return await self._split(body, adapters, headers)
                return await self._forwarded(path, {**body, "model": adapters[0]}, headers)
            except (InputError, TypeError) as error:
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
        if model in self._names:
            return [model]
        if model != ROUTED:
            known = nearest(str(model), [ROUTED, *self._names])
            raise _RefusedError(f"model {shown(model)} is not served{known}", 404)

        def route() -> list[str]:
            prompts = self._router.completion_prompts(body) if path == COMPLETIONS else [self._router.chat_prompt(body)]
            return self._router.adapters(prompts)

        with self.metrics.timed("routing"):
            return await run_in_threadpool(route)

    async def _forwarded(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
        """Return the server's answer as it is, with the adapter's name in a header."""
        if body.get("stream"):
            return await self._streamed(path, body, headers)
        answer = await self._sent(path, body, headers)
        return _passed(answer, str(body["model"]))

    async def _sent(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> httpx.Response:
        with self.metrics.timed("server"):
            answer = await self._client.post(path, json=body, headers={**headers, "accept-encoding": "identity"})
        self.metrics.answered(body["model"], answer.status_code)
        return answer

    async def _streamed(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
        """Return the server's events as they come. The request is being answered until the last one is passed on."""
        headers = {**headers, "accept-encoding": "identity"}
        async with AsyncExitStack() as held:
            held.enter_context(self.metrics.timed("server"))
            answer = await self._client.send(
                self._client.build_request("POST", path, json=body, headers=headers), stream=True
            )
            held.push_async_callback(answer.aclose)
            self.metrics.answered(body["model"], answer.status_code)
            if answer.status_code != 200:
                await answer.aread()
                return _passed(answer, str(body["model"]))
            held.enter_context(self.metrics.running())
            kind = answer.headers.get("content-type", "text/event-stream")
            events, told = self._events(answer), {ADAPTER_HEADER: str(body["model"])}
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

    async def _split(self, body: Mapping[str, Any], adapters: Sequence[str], headers: Mapping[str, str]) -> Response:
        """Return one completion of prompts that several adapters answer."""
        if body.get("stream"):
            raise InputError("prompt: these prompts go to several adapters, and one stream has one; send them apart")
        groups = {name: [i for i, own in enumerate(adapters) if own == name] for name in dict.fromkeys(adapters)}
        bodies = [
            {**body, "model": name, "prompt": [body["prompt"][place] for place in places]}
            for name, places in groups.items()
        ]
        asked = [asyncio.ensure_future(self._sent(COMPLETIONS, one, headers)) for one in bodies]
        try:
            answers = await asyncio.gather(*asked)
        finally:
            for one in asked:  # where one fails, nobody waits for the others
                one.cancel()
        for answer, name in zip(answers, groups, strict=True):
            if answer.status_code != 200:
                return _passed(answer, name)
        parts = [(places, answer.content) for places, answer in zip(groups.values(), answers, strict=True)]
        return JSONResponse(joined(parts, body.get("n") or 1, ROUTED), headers={ADAPTER_HEADER: ",".join(groups)})


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


async def _read(request: Request) -> dict[str, Any]:
    """Return a request's body. InputError where it is no JSON object, or too large."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LARGEST:
            raise _RefusedError(f"the body has over {LARGEST} bytes; send fewer prompts in a request", 413)
    try:
        body = json.loads(content)
    except ValueError as error:
        raise InputError(f"the body is not JSON ({first_line(error)})") from None
    if not isinstance(body, dict):
        raise InputError("the body is no JSON object")
    return body


def _passed(answer: httpx.Response, adapter: str) -> Response:
    kind = answer.headers.get("content-type", "application/json")
    return Response(answer.content, answer.status_code, media_type=kind, headers={ADAPTER_HEADER: adapter})


def _said(error: Exception) -> str:
    return first_line(error) if str(error) else type(error).__name__
