"""A hub on the loopback interface: repositories of models and data sets, as the Hugging Face hub serves them.

It answers what the hub's client asks of it: a repository's commits, its files' names, and files. Large files are
redirected to a storage. Requests for a file can be made to fail, or to end in mid-download.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_allowed"
"""The token that private and gated repositories ask for. Any other token is that of a user without access."""
LARGE = (".safetensors", ".bin", ".parquet", ".model")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    """A model or a data set: its commits, oldest first, and the commits that branches and tags name."""

    name: str
    kind: Literal["models", "datasets", "spaces"]
    access: Literal["public", "gated", "private"]
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        """Return the commit that a branch, a tag or a commit's own id names."""
        return revision if revision in self.commits else self.names.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return a commit's files."""
        return self.commits[self.names[revision]]


@dataclass
class Answer:
    """What the hub answers: `length` is given where the body has another one."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """A hub that serves while it is entered as a context. `log` holds (method, path, headers) of every request.

    `moved` names repositories' former names. `faults` holds, by a file's "org/name/path", what its next downloads
    meet: a status, or ("cut", N) for a connection that is closed after N bytes.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[str, str] = {}
        self.faults: dict[str, list[int | tuple[Literal["cut"], int]]] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"  # another host, so that the client sends it no token

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self,
        name: str,
        files: Mapping[str, bytes] | Path,
        *,
        kind: Literal["models", "datasets", "spaces"] = "models",
        access: Literal["public", "gated", "private"] = "public",
        names: Iterable[str] = ("main",),
    ) -> str:
        """Add a commit that holds `files`, or a folder's, and let branches and tags name it. Return its id."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        repository = self.repositories.setdefault((kind, name), Repository(name, kind, access))
        tree = "".join(f"{path} {_blob_id(content)}\n" for path, content in sorted(files.items()))
        commit = hashlib.sha1(f"{len(repository.commits)}\n{tree}".encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.names.update(dict.fromkeys(names, commit))
        return commit

    def downloads(self, name: str) -> list[str]:
        """Return the paths of a repository's files that were asked for with GET, in order; repeats are kept."""
        inside = f"/{name}/"
        return [
            path.split(inside, 1)[1].removeprefix("resolve/").partition("/")[2]
            for method, path, _ in self.log
            if method == "GET" and inside in path and "/api/" not in path
        ]

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Return the answer to a request."""
        self.log.append((method, path, dict(headers)))
        parts, query = urlsplit(path), parse_qs(urlsplit(path).query)
        segments = parts.path.strip("/").split("/")
        api = segments[0] == "api"
        rest = segments[1:] if api else segments
        storage = rest[0] == "storage"
        kind = rest[0] if rest[0] in ("models", "datasets", "spaces") else "models"
        rest = rest[1:] if rest[0] in ("models", "datasets", "spaces", "storage") else rest
        name, rest = self._named(kind, rest)
        if name in self.moved:
            return Answer(307, headers={"Location": path.replace(name, self.moved[name], 1)})
        repository = self.repositories.get((segments[1] if storage else kind, name))
        if storage:
            return self._stored(segments)
        refused = _refusal(repository, headers.get("authorization", ""), info=api)
        if repository is None or refused is not None:
            return refused or Answer(404)
        wanted = unquote(rest[1]) if len(rest) > 1 else "main"
        commit = repository.commit(wanted)
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {wanted}")
        within = unquote("/".join(rest[2:]))
        if not api:
            return self._file(repository, commit, within)
        if not rest or rest[0] == "revision":
            return _json(_info(repository, commit))
        tree = _entries(repository.commits[commit])
        if rest[0] == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return _json([tree[path] for path in paths if path in tree])
        if rest[0] != "tree" or (within and within not in tree):
            return _error(404, "EntryNotFound", "Entry not found")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        return _json([entry for path, entry in tree.items() if _below(path, within, recursive)])

    def _named(self, kind: str, segments: list[str]) -> tuple[str, list[str]]:
        """Split a path's segments into a repository's name, of one or two segments, and the rest."""
        verbs = ("resolve", "revision", "tree", "paths-info")
        single = len(segments) == 1 or segments[1] in verbs
        count = 1 if single else 2
        return "/".join(segments[:count]), segments[count:]

    def _file(self, repository: Repository, commit: str, path: str) -> Answer:
        content = repository.commits[commit].get(path)
        found = {"X-Repo-Commit": commit}
        if content is None:
            missing = _error(404, "EntryNotFound", "Entry not found")
            return Answer(404, missing.body, missing.headers | found)
        if not path.endswith(LARGE):
            return self._content(repository.name, path, content, found | {"ETag": f'"{_blob_id(content)}"'})
        digest = hashlib.sha256(content).hexdigest()
        found |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        where = f"{self.storage}/storage/{repository.kind}/{commit}/{repository.name}/resolve/{commit}/{path}"
        return Answer(302, headers=found | {"Location": where})

    def _stored(self, segments: list[str]) -> Answer:
        name, rest = self._named(segments[1], segments[3:])
        repository, path = self.repositories[segments[1], name], unquote("/".join(rest[2:]))
        content = repository.commits[segments[2]][path]
        return self._content(name, path, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def _content(self, name: str, path: str, content: bytes, headers: dict[str, str]) -> Answer:
        return Answer(200, content, headers | {"Accept-Ranges": "bytes", "File": f"{name}/{path}"})


def ask(hub: Hub, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Let this process ask a hub, with an empty cache in `home` and no token. The client has read its variables."""
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    url = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    patch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}), raising=False)  # unknown to older clients
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.delenv("HF_TOKEN", raising=False)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._send(self.hub.answer(self.command, self.path, headers, body), headers.get("range"))

    def _send(self, answer: Answer, wanted: str | None) -> None:
        file = answer.headers.pop("File", "")
        faults = self.hub.faults.get(file, []) if self.command == "GET" else []
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            answer, fault = Answer(fault, b"out of order"), None
        body = answer.body
        if wanted is not None and answer.status == 200:
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(body)) + bool(last), len(body))
            answer.status = 206
            answer.headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(body)}"
            body = body[int(first) : end]
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if fault is None else body[: fault[1]])
        self.wfile.flush()
        self.close_connection = self.close_connection or fault is not None

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _refusal(repository: Repository | None, authorization: str, *, info: bool) -> Answer | None:
    """Return the hub's refusal, or None. The hub shows a gated repository's names of files to everybody."""
    if authorization == f"Bearer {TOKEN}":
        return _error(404, "RepoNotFound", "Repository not found") if repository is None else None
    if repository is None or repository.access == "private":
        status = 404 if authorization else 401  # The hub does not say whether there is such a repository.
        return _error(status, "RepoNotFound", "Invalid username or password." if status == 401 else "Not found")
    if repository.access == "gated" and not info:
        said = f"Access to model {repository.name} is restricted."
        return _error(403 if authorization else 401, "GatedRepo", said)
    return None


def _info(repository: Repository, commit: str) -> dict[str, Any]:
    return {
        "_id": commit[:24],
        "id": repository.name,
        "sha": commit,
        "lastModified": DATE,
        "createdAt": DATE,
        "private": repository.access == "private",
        "gated": "manual" if repository.access == "gated" else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in repository.commits[commit]],
    }


def _entries(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Return a tree's files and folders by path, as the hub describes them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        folders = path.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            folder = "/".join(folders[:depth])
            entries[folder] = {"type": "directory", "oid": _blob_id(folder.encode()), "size": 0, "path": folder}
        entries[path] = {"type": "file", "oid": _blob_id(content), "size": len(content), "path": path}
        if path.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            entries[path]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entries


def _below(path: str, folder: str, recursive: bool) -> bool:
    inside = f"{folder}/" if folder else ""
    return path.startswith(inside) and (recursive or "/" not in path[len(inside) :])


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _json(value: Any) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _error(status: int, code: str, message: str) -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return Answer(status, json.dumps({"error": message}).encode(), headers)
