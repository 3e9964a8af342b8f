"""A server on loopback that speaks what huggingface_hub asks of the hub for an upload: over real HTTP.

Repositories, branches and commits are kept in memory. Large files come by Git LFS, or by the xet protocol's three calls
(a token, chunks, the list of them); of the latter only that they came and how many bytes is known here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

TOKEN = "hf_" + "TestOnlyTokenOfTheLoopbackHub"
"""The one that is let in."""


@dataclass
class Repository:
    """What is in one."""

    is_private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)
    """The header of each: summary, and the branch."""


@dataclass
class Hub:
    """What happened, and what is to go wrong."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Method and path of each."""
    failures: dict[str, int] = field(default_factory=dict)
    """By a pattern of method and path: the status to answer with; 0 to break the connection."""
    once: dict[str, int] = field(default_factory=dict)
    """The same, for the first such request alone."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    xet_bytes: int = 0
    makes_public: bool = False
    """Whether it makes every repository public, whatever was asked for."""
    leaked: list[str] = field(default_factory=list)
    """Requests to the store that bore the token, which is no business of it."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def _route(self, method: str) -> None:
        path = self.path.partition("?")[0]
        asked = f"{method} {path}"
        self.state.requests.append(asked)
        body = self._body()
        status = next((code for pattern, code in self.state.failures.items() if re.search(pattern, asked)), None)
        for pattern in [pattern for pattern in self.state.once if re.search(pattern, asked)]:
            status = self.state.once.pop(pattern)
        if status == 0:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if status is not None:
            self._say(status, {"error": f"made to fail, with {TOKEN} in it"})
            return
        is_store = re.match(r"/(lfs|v\d|shards)\b", path) is not None
        if is_store:
            if TOKEN in (self.headers.get("Authorization") or ""):
                self.state.leaked.append(asked)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._say(401, {"error": "Invalid username or password."})
            return
        for pattern, answer in self._ROUTES.items():
            if found := re.fullmatch(pattern, asked):
                answer(self, body, *found.groups())
                return
        self._say(404, {"error": f"no such page: {asked}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _say(self, status: int, value: object, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _about(self, _: bytes, repo: str, branch: str = "main") -> None:
        found = self.state.repositories.get(repo)
        if found is None:
            self._say(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            head = max((at for at, commit in enumerate(found.commits, 1) if commit["branch"] == branch), default=0)
            self._say(200, {"id": repo, "private": found.is_private, "sha": f"{head:040x}", "siblings": []})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.state.repositories:
            self._say(409, {"error": "You already created this model repo"})
            return
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        self.state.repositories[repo] = Repository(is_private and not self.state.makes_public)
        self._say(200, {"url": f"{self.state.url}/{repo}", "name": repo})

    def _validate(self, body: bytes) -> None:
        front = json.loads(body)["content"].split("---")[1]
        wrong = (
            []
            if "license: " not in front or "license: nonsense" not in front
            else [{"message": '"license" is unknown'}]
        )
        self._say(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def _branch(self, _: bytes, repo: str, branch: str) -> None:
        branches = self.state.repositories[repo].branches
        if branch in branches:
            self._say(409, {"error": "Reference already exists"})
            return
        branches[branch] = dict(branches["main"])
        self._say(200, {})

    def _modes(self, body: bytes, repo: str, branch: str) -> None:
        if branch not in self.state.repositories[repo].branches:
            self._say(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        there = self.state.repositories[repo].branches[branch]
        modes = []
        for name in [file["path"] for file in json.loads(body)["files"]]:
            is_large = name.endswith(".safetensors")
            mode = {"path": name, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if name in there:
                as_git = b"blob %d\0" % len(there[name]) + there[name]
                mode["oid"] = hashlib.sha256(there[name]).hexdigest() if is_large else hashlib.sha1(as_git).hexdigest()
            modes.append(mode)
        self._say(200, {"files": modes})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.state.url}/lfs/{asked['oid']}", "header": {}}}}
            for asked in json.loads(body)["objects"]
        ]
        self._say(200, {"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._say(400, {"error": "not what its digest says"})
            return
        self.state.stored[oid] = body
        self._say(200, {})

    def _xet_token(self, _: bytes, repo: str, branch: str) -> None:
        self._say(200, {"accessToken": "of-the-store", "casUrl": self.state.url, "exp": 2**32})

    def _xet_chunks(self, body: bytes, *_: str) -> None:
        self.state.xet_bytes += len(body)
        self._say(200, {"was_inserted": True})

    def _xet_list(self, body: bytes, *_: str) -> None:
        self._say(200, {"result": 1})

    def _commit(self, body: bytes, repo: str, branch: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                # By xet the bytes are only in its chunks.
                files[value["path"]] = self.state.stored.get(value["oid"], value["oid"].encode())
        found = self.state.repositories[repo]
        found.branches[branch] |= files
        found.commits.append({**lines[0]["value"], "branch": branch})
        commit = f"{len(found.commits):040x}"
        answer = {"commitUrl": f"{self.state.url}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None}
        self._say(200, answer)

    _NAME = r"([\w.-]+/[\w.-]+)"
    _ROUTES: ClassVar = {
        rf"GET /api/models/{_NAME}": _about,
        rf"GET /api/models/{_NAME}/revision/([^/]+)": _about,
        r"POST /api/repos/create": _create,
        r"POST /api/validate-yaml": _validate,
        rf"POST /api/models/{_NAME}/branch/([^/]+)": _branch,
        rf"POST /api/models/{_NAME}/preupload/([^/]+)": _modes,
        rf"POST /{_NAME}\.git/info/lfs/objects/batch": _batch,
        r"PUT /lfs/(\w+)": _store,
        rf"GET /api/models/{_NAME}/xet-write-token/([^/]+)": _xet_token,
        r"POST /v1/xorbs/.*": _xet_chunks,
        r"POST /(v1/)?shards": _xet_list,
        rf"POST /api/models/{_NAME}/commit/([^/]+)": _commit,
    }
