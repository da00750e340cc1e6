"""twin-bench serve."""

from __future__ import annotations

import argparse
from pathlib import Path

from twin_bench.console import add_device, positive

SUMMARY = "route OpenAI-style requests to the adapters of an exported twin (extra: serve)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "directory", metavar="DIRECTORY", type=Path, help="the export, from twin-bench export --format vllm"
    )
    parser.add_argument(
        "--upstream",
        metavar="URL",
        default="http://127.0.0.1:8000",
        help="the server that has the adapters (default: http://127.0.0.1:8000)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=positive, default=8001, help="the port to listen on (default: 8001)")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive,
        default=600,
        help="how long the server may be silent during a request (default: 600)",
    )
    add_device(parser, "cpu")


def run(options: argparse.Namespace) -> None:
    """Serve until the process is ended; InputError for an export, an address or a package that is not there."""
    import socket
    from urllib.parse import urlsplit

    from twin_bench.errors import InputError

    try:
        import httpx
        import uvicorn

        from twin_bench.front.app import create_app
    except ImportError as error:
        raise InputError(f"serve: {error.name} is not installed; pip install 'twin-bench[serve]'") from None
    from twin_bench.front.routing import PromptRouter

    address = urlsplit(options.upstream)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise InputError(f"--upstream {options.upstream}: expected an address such as http://127.0.0.1:8000")
    router = PromptRouter.open(options.directory, device=options.device)
    listening = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        raise InputError(f"{options.host}:{options.port}: can't be listened on ({error}); give --port") from None
    timeout, limits = httpx.Timeout(options.timeout, connect=10), httpx.Limits(max_connections=None)
    client = httpx.AsyncClient(
        base_url=options.upstream.rstrip("/"), timeout=timeout, limits=limits, trust_env=False
    )  # not through a proxy, which would read the requests
    settings = uvicorn.Config(create_app(router, client), log_level="warning" if options.quiet else "info")
    uvicorn.Server(settings).run(sockets=[listening])
