"""The front's API: requests go on under an adapter's name, answers and streams come back, errors say what is wrong."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.families import Family
from tests.support.stub_server import Broken, Stub, Uneven, Waiting
from twin_bench.cli import main
from twin_bench.front.routing import PromptRouter

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from twin_bench.front.app import create_app

Ask = Callable[..., httpx.Response]


def asking(router: PromptRouter, transport: httpx.AsyncBaseTransport) -> Ask:
    """Return a function that sends one request to a front whose server is behind `transport`."""
    return asking_app(create_app(router, httpx.AsyncClient(transport=transport, base_url="http://vllm")))


def asking_app(app: Any) -> Ask:
    """Return a function that sends one request to an application."""

    def ask(method: str, path: str, **request: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
                return await client.request(method, path, **request)

        return asyncio.run(send())

    return ask


@pytest.fixture
def stub(router: PromptRouter) -> Stub:
    return Stub([*router.served.adapters, "twin/shared"])


@pytest.fixture
def ask(router: PromptRouter, stub: Stub) -> Ask:
    return asking(router, httpx.ASGITransport(stub))


@pytest.fixture(scope="module")
def prompts(router: PromptRouter, matrix_family: Family) -> dict[str, str]:
    """Return a text for each of the adapters that some row of the router goes to; two at least."""
    rows = [json.loads(line)["text"] for line in (matrix_family.root / "router.jsonl").read_text().splitlines()]
    found = dict(zip(router.adapters(router.completion_prompts({"prompt": rows})), rows, strict=True))
    assert len(found) >= 2
    return found


def test_a_completion_goes_to_its_adapter(ask: Ask, stub: Stub, prompts: dict[str, str]) -> None:
    for adapter, prompt in prompts.items():
        headers = {"authorization": "Bearer x", "x-other": "kept here"}
        body = {"model": "twin/routed", "prompt": prompt, "temperature": 0.3, "n": 2}
        answer = ask("POST", "/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["x-twin-adapter"] == adapter
        assert [choice["text"] for choice in answer.json()["choices"]] == [f"{adapter}: {prompt} {n}" for n in (0, 1)]
        assert stub.asked[-1] == {**body, "model": adapter}
        assert stub.headers[-1]["authorization"] == "Bearer x"
        assert "x-other" not in stub.headers[-1]


def test_prompts_of_one_request_go_to_their_own_adapters(ask: Ask, stub: Stub, prompts: dict[str, str]) -> None:
    (a, one), (b, two) = list(prompts.items())[:2]
    answer = ask("POST", "/v1/completions", json={"model": "twin/routed", "prompt": [one, two, one], "n": 2})
    assert [body["model"] for body in stub.asked] == [a, b]
    body = answer.json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    expected = [f"{name}: {text} {n}" for name, text in ((a, one), (b, two), (a, one)) for n in (0, 1)]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert (body["model"], body["usage"]["total_tokens"]) == ("twin/routed", 14)
    assert answer.headers["x-twin-adapter"] == f"{a},{b}"
    streamed = ask("POST", "/v1/completions", json={"prompt": [one, two], "stream": True})
    assert streamed.status_code == 400
    assert "send them apart" in streamed.json()["error"]["message"]


def test_a_chat_goes_to_the_adapter_of_its_template(
    ask: Ask, router: PromptRouter, prompts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.tokenizer, "chat_template", "{{ messages[0].content }}")
    for adapter, prompt in prompts.items():
        body = {"model": "twin/routed", "messages": [{"role": "user", "content": prompt}]}
        answer = ask("POST", "/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["message"]["content"] == adapter


def test_a_model_that_is_named_is_not_routed(ask: Ask, stub: Stub, prompts: dict[str, str]) -> None:
    for name in ("calm", "bbq", "twin/shared"):
        ask("POST", "/v1/completions", json={"model": name, "prompt": next(iter(prompts.values()))})
        assert stub.asked[-1]["model"] == name
    answer = ask("POST", "/v1/completions", json={"model": "bbc", "prompt": "the cat"})
    assert answer.status_code == 404
    assert "'bbc' is not served; did you mean 'bbq'" in answer.json()["error"]["message"]
    listed = [model["id"] for model in ask("GET", "/v1/models").json()["data"]]
    assert listed == ["twin/routed", "mmlu", "bbq", "cnn_dailymail", "calm", "twin/shared"]


def test_a_stream_is_passed_through(ask: Ask, stub: Stub, prompts: dict[str, str]) -> None:
    adapter, prompt = next(iter(prompts.items()))
    answer = ask("POST", "/v1/completions", json={"model": "twin/routed", "prompt": prompt, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-twin-adapter"] == adapter
    assert answer.text == f"data: {adapter} a\n\ndata: {adapter} b\n\ndata: {adapter} [DONE]\n\n"


def raw(app: Any, on_first: Callable[[], None], *, gone: asyncio.Event | None = None) -> None:
    """Ask an application for a stream, and call a function at its first event. The client has left once `gone` is set.

    httpx's own transport gives an answer only when it is complete.
    """
    body = json.dumps({"model": "bbq", "prompt": "x", "stream": True}).encode()
    scope = {
        **{"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"},
        **{"query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http", "root_path": ""},
        "asgi": {"version": "3.0"},
    }
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body") == b"data: first\n\n":
            on_first()

    asyncio.run(asyncio.wait_for(app(scope, receive, send), timeout=10))


def metrics_of(app: Any) -> list[str]:
    with ThreadPoolExecutor(1) as thread:  # the caller may stand in a loop of its own
        return thread.submit(asking_app(app), "GET", "/metrics").result().text.splitlines()


def test_an_event_is_passed_on_before_the_next_one_comes_and_its_request_is_running(router: PromptRouter) -> None:
    seen, during = asyncio.Event(), list[str]()
    app = create_app(router, httpx.AsyncClient(transport=Waiting(seen), base_url="http://vllm"))

    def on_first() -> None:
        during.extend(metrics_of(app))
        seen.set()

    raw(app, on_first)
    assert "twin_front_requests_running 1" in during
    assert "twin_front_server_seconds_count 0" in during
    after = metrics_of(app)
    assert "twin_front_requests_running 0" in after
    assert "twin_front_server_seconds_count 1" in after
    assert 'twin_front_requests_total{adapter="bbq",status="200"} 1' in after


def test_a_client_that_leaves_ends_its_stream(router: PromptRouter) -> None:
    never, gone = asyncio.Event(), asyncio.Event()
    server = Waiting(never)
    app = create_app(router, httpx.AsyncClient(transport=server, base_url="http://vllm"))
    raw(app, gone.set, gone=gone)
    assert server.closed
    assert "twin_front_requests_running 0" in metrics_of(app)


def test_the_server_s_own_errors_are_passed_through(ask: Ask, prompts: dict[str, str]) -> None:
    prompt = next(iter(prompts.values()))
    for stream in (False, True):
        answer = ask("POST", "/v1/completions", json={"prompt": prompt, "max_tokens": 0, "stream": stream})
        assert (answer.status_code, answer.json()) == (400, {"error": {"message": "max_tokens must be 1"}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"[1]", "no JSON object"),
        (b'{"prompt": 3}', "expected a text"),
        (b'{"prompt": "x", "temperature": NaN}', "'NaN' is no finite number"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": "half \\ud800"}', "'\\ud800' is no character"),
        (b'{"prompt": "x", "model": ["bbq"]}', "expected a name of at most 256 characters"),
        (b'{"prompt": "x", "model": "' + b"b" * 257 + b'"}', "expected a name of at most 256 characters"),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else None,
)
def test_a_bad_request_is_told_in_openai_s_form(ask: Ask, stub: Stub, content: bytes, said: str) -> None:
    answer = ask("POST", "/v1/completions", content=content)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not stub.asked


def test_what_only_other_encodings_lack_goes_on_as_it_came(ask: Ask, stub: Stub) -> None:
    """A half of a surrogate pair is valid JSON, and a header may hold any byte."""
    for stream in (False, True):
        content = json.dumps({"model": "bbq", "prompt": "é", "user": "\ud800", "stream": stream}).encode()
        headers = {"x-request-id": "é".encode("latin-1"), "authorization": "Bearer é".encode("latin-1")}
        assert ask("POST", "/v1/completions", content=content, headers=headers).status_code == 200
        assert stub.asked[-1] == json.loads(content)
        assert (stub.headers[-1]["x-request-id"], stub.headers[-1]["authorization"]) == ("é", "Bearer é")
        assert stub.headers[-1]["content-type"] == "application/json"


def test_prompts_of_several_adapters_need_a_number_of_choices(ask: Ask, stub: Stub, prompts: dict[str, str]) -> None:
    answer = ask("POST", "/v1/completions", json={"prompt": list(prompts.values()), "n": "2"})
    assert answer.status_code == 400
    assert "n: expected a whole number of at least 1, not '2'" in answer.json()["error"]["message"]
    assert not stub.asked


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [(httpx.ReadTimeout("slow"), 504, "timeout"), (httpx.ConnectError("refused"), 502, "unreachable")],
)
def test_a_server_that_fails_is_told_and_counted(
    router: PromptRouter, error: Exception, status: int, kind: str, stream: bool
) -> None:
    ask = asking(router, Broken(error))
    answer = ask("POST", "/v1/completions", json={"prompt": "the cat", "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status
    assert f'twin_front_errors_total{{kind="{kind}"}} 1' in ask("GET", "/metrics").text
    health = ask("GET", "/health")
    assert (health.status_code, "can't be reached" in health.json()["status"]) == (503, True)


def test_a_stream_that_breaks_says_so(router: PromptRouter) -> None:
    ask = asking(router, Broken(httpx.ReadError("gone"), after_event=True))
    lines = ask("POST", "/v1/completions", json={"prompt": "the cat", "stream": True}).text.split("\n\n")
    lines = [line for line in lines if line]
    assert lines[0] == "data: first"
    assert json.loads(lines[1].removeprefix("data: "))["error"]["message"] == "the server's stream broke off (gone)"
    assert 'kind="broken_stream"} 1' in ask("GET", "/metrics").text


def test_health_and_metrics(ask: Ask, stub: Stub, prompts: dict[str, str]) -> None:
    assert ask("GET", "/health").status_code == 200
    stub.mood = "ill"
    assert (ask("GET", "/health").status_code, ask("GET", "/health").json()["status"]) == (
        503,
        "the server's /health says 503",
    )
    adapter, prompt = next(iter(prompts.items()))
    for _ in range(2):
        ask("POST", "/v1/completions", json={"prompt": prompt})
    lines = ask("GET", "/metrics").text.splitlines()
    assert f'twin_front_requests_total{{adapter="{adapter}",status="200"}} 2' in lines
    assert "twin_front_routing_seconds_count 2" in lines
    assert "twin_front_requests_running 0" in lines


@pytest.mark.parametrize("own", [{"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}])
def test_a_request_s_own_template_is_refused(
    ask: Ask, stub: Stub, router: PromptRouter, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any]
) -> None:
    """A template is a program, and the router would read another text than the server."""
    monkeypatch.setattr(router.tokenizer, "chat_template", "{{ messages[0].content }}")
    body = {"messages": [{"role": "user", "content": "the cat"}]}
    assert ask("POST", "/v1/chat/completions", json=body).status_code == 200
    stub.asked.clear()
    for model in ("twin/routed", "bbq"):
        answer = ask("POST", "/v1/chat/completions", json={**body, **own, "model": model})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "chat_template: the template is the model's own; leave it out"
    assert not stub.asked


def test_a_body_that_is_too_large_is_refused(
    ask: Ask, stub: Stub, prompts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"prompt": next(iter(prompts.values()))}).encode()
    monkeypatch.setattr("twin_bench.front.app.LARGEST", len(body))
    assert ask("POST", "/v1/completions", content=body).status_code == 200
    answer = ask("POST", "/v1/completions", content=body + b" ")
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (413, "invalid_request_error")
    assert f"over {len(body)} bytes" in error["message"]
    assert len(stub.asked) == 1


def test_prompts_of_one_request_fail_together(router: PromptRouter, prompts: dict[str, str]) -> None:
    """Where one group's request fails, those of the others are given up: nobody waits for their answers."""
    server = Uneven(httpx.ReadTimeout("slow"))
    app = create_app(router, httpx.AsyncClient(transport=server, base_url="http://vllm"))

    async def send() -> tuple[httpx.Response, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            answer = await client.post("/v1/completions", json={"prompt": list(prompts.values())})
            await asyncio.sleep(0)
            return answer, server.given_up  # before the loop ends, and with it all that it runs

    answer, given_up = asyncio.run(send())
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout_error")
    assert given_up == len(prompts) - 1 >= 1


def test_a_server_whose_answer_is_no_completion_is_told(ask: Ask, stub: Stub, prompts: dict[str, str]) -> None:
    stub.mood = "odd"
    answer = ask("POST", "/v1/completions", json={"prompt": list(prompts.values())})
    assert (answer.status_code, answer.json()["error"]["type"]) == (502, "upstream_error")
    assert "gave no completion (KeyError: 'index')" in answer.json()["error"]["message"]
    assert 'twin_front_errors_total{kind="malformed"} 1' in ask("GET", "/metrics").text


def test_an_error_of_the_front_itself_is_no_client_s(
    ask: Ask, router: PromptRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "adapters", lambda prompts: len(prompts, 1))  # a mistake in the code
    with pytest.raises(TypeError, match="exactly one argument"):
        ask("POST", "/v1/completions", json={"prompt": "the cat"})


def test_the_server_must_say_soon_that_it_is_well(router: PromptRouter) -> None:
    server = Uneven(httpx.ReadTimeout("slow"))
    client = httpx.AsyncClient(transport=server, base_url="http://vllm", timeout=600)
    assert asking_app(create_app(router, client))("GET", "/health").status_code == 503
    assert set(server.timeouts[0].values()) == {5.0}


@pytest.fixture
def upstream() -> Iterator[str]:
    """Give the address of a server that is well."""

    class Well(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Well) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_command_asks_the_server_itself_and_as_often_as_it_is_asked(
    router: PromptRouter, upstream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy of the environment would read the requests, and httpx's own limit lets 100 wait behind each other."""
    import uvicorn

    found, limits, client_of = [], [], httpx.AsyncClient

    def client(**options: Any) -> httpx.AsyncClient:
        limits.append(options["limits"].max_connections)
        return client_of(**options)

    def run(server: Any, sockets: Any) -> None:
        monkeypatch.setattr(httpx, "AsyncClient", client_of)
        found.append(asking_app(server.config.app)("GET", "/health").status_code)
        sockets[0].close()

    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(PromptRouter, "open", lambda *_, **__: router)
    monkeypatch.setattr(httpx, "AsyncClient", client)
    monkeypatch.setattr(uvicorn.Server, "run", run)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["serve", "an-export", "--upstream", upstream, "--port", str(port)]) == 0
    assert (found, limits) == ([200], [None])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--upstream", "localhost:8000"], "expected an address such as http://127.0.0.1:8000"),
        (["--port", "70000"], "can't be listened on"),
    ],
)
def test_the_command_refuses_what_it_cannot_serve(
    exported: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["serve", str(exported), *arguments]) == 2
    assert said in capsys.readouterr().err
