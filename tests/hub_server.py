"""A local Hub on 127.0.0.1 for the real clients, with strict checks of requests, and faults on request.

It speaks the protocol of huggingface_hub 2.4: repositories of models, datasets and Spaces with branches, tags, privacy
and gates; commits in newline-delimited JSON; large files over LFS, on another origin (another port).
A request that a well-behaved client does not send is answered with an error and recorded in `HubServer.violations`.
"""

import base64
import binascii
import hashlib
import json
import os
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


OWNER_TOKEN = "hf_ownerOwnerOwnerOwnerOwnerOwnerOwn"
READER_TOKEN = "hf_readerReaderReaderReaderReaderRea"
STRANGER_TOKEN = "hf_strangerStrangerStrangerStrangerS"
# The files that .gitattributes of a new repository sends to LFS, as far as these tests need them.
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".arrow")
SPACE_SDKS = ("gradio", "docker", "static")
# https://huggingface.co/docs/hub/spaces-config-reference
SPACE_COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
LFS_SIZE = 10 * 2**20
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = r"/api/(?P<kind>models|datasets|spaces)/" + REPO
FILES = r"/(?P<prefix>datasets/|spaces/)?" + REPO
REV = r"(?P<rev>[^/]+)"


@dataclass(frozen=True)
class User:
    name: str
    can_write: bool


@dataclass(frozen=True)
class Blob:
    """A file: its git object name and its content. A large file is identified by its sha256."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    @property
    def oid(self) -> str:
        data = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def row(self, path: str) -> dict:
        row = {"type": "file", "oid": self.oid, "size": len(self.content), "path": path}
        if self.is_lfs:
            row["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return row


@dataclass(frozen=True)
class Commit:
    files: dict[str, Blob]
    parent: str | None
    title: str

    @property
    def oid(self) -> str:
        state = [self.parent, self.title, sorted((path, blob.oid) for path, blob in self.files.items())]
        return hashlib.sha1(json.dumps(state).encode()).hexdigest()


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def files(self) -> dict[str, bytes]:
        """The files on the main branch."""
        return {path: blob.content for path, blob in self.commits[self.branches["main"]].files.items()}

    def resolve(self, rev: str) -> str | None:
        return self.branches.get(rev) or self.tags.get(rev) or (rev if rev in self.commits else None)

    def add(self, branch: str, files: dict[str, Blob], title: str) -> Commit:
        commit = Commit(files, self.branches.get(branch), title)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit


@dataclass
class Fault:
    """A fault in requests that match a pattern.

    Args:
        pattern (`str`): Regular expression to search in "METHOD /path?query".
        status (`int`, *optional*): Status of the answer, instead of a normal one.
        headers (`dict`): Headers of that answer.
        cut (`"fin"` or `"reset"`, *optional*): How the connection is cut after half of the body (sent or received).
        corrupt (`bool`): Whether to change a byte of the body.
        lose_answer (`bool`): Whether to process the request but lose the answer.
        call (`Callable`, *optional*): Function to call first.
        times (`int`, *optional*): Number of faults; unlimited by default.
    """

    pattern: str
    status: int | None = None
    headers: dict = field(default_factory=dict)
    cut: str | None = None
    corrupt: bool = False
    lose_answer: bool = False
    call: Callable[[], None] | None = None
    times: int | None = None
    hits: int = 0


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    user: str | None
    status: int


class HttpError(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "", **body) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


class HubServer:
    """The Hub, and a second server for large files.

    `endpoint` is the value for HF_ENDPOINT. `repos` maps (kind, id) to [`Repo`], where the kind is "models",
    "datasets" or "spaces"; `requests` lists all requests, and `violations` those that no client may send.
    """

    def __init__(self) -> None:
        self.users = {
            OWNER_TOKEN: User("owner", can_write=True),
            READER_TOKEN: User("owner", can_write=False),
            STRANGER_TOKEN: User("stranger", can_write=True),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.violations: list[str] = []
        self.page_size = 1000
        self.lock = threading.RLock()
        self._servers = [_Server(self, _HubHandler), _Server(self, _ObjectHandler)]
        self.endpoint, self.objects_endpoint = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def stop(self) -> None:
        for server in self._servers:
            server.stop()

    def fail(self, pattern: str, **fault) -> Fault:
        """Make matching requests fail from now on; see [`Fault`]."""
        self.faults.append(Fault(pattern, **fault))
        return self.faults[-1]

    def heal(self) -> None:
        self.faults.clear()

    def environment(self, home: str | os.PathLike, token: str | None = None) -> dict[str, str]:
        """Return the environment of a separate client process, with this Hub only and its own cache."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return environment | ({"HF_TOKEN": token} if token else {})

    def put(self, kind: str, repo_id: str, files: dict[str, bytes], **settings) -> Repo:
        """Create a repository, or a commit in it, without a client."""
        with self.lock:
            repo = self.repos.setdefault((kind, repo_id), Repo(kind, repo_id, **settings))
            blobs = {path: Blob(content, is_large(path, content)) for path, content in files.items()}
            self.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.is_lfs}
            head = repo.branches.get("main")
            repo.add("main", {**(repo.commits[head].files if head else {}), **blobs}, "Put")
            return repo

    def check_secrets(self) -> None:
        """Check that no published file and no request contains a token."""
        published = [
            (repo.id, path, blob.content)
            for repo in self.repos.values()
            for commit in repo.commits.values()
            for path, blob in commit.files.items()
        ]
        asked_for = [(request.method, request.path, request.path.encode()) for request in self.requests]
        for *where, content in published + asked_for:
            assert not any(token.encode() in content for token in self.users), where

    def _fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.pattern, f"{method} {path}") and (fault.times is None or fault.hits < fault.times):
                    fault.hits += 1
                    return fault
        return None


def is_large(path: str, content: bytes, size: int | None = None) -> bool:
    """Whether the Hub wants a file over LFS, by its name, size and first bytes."""
    size = len(content) if size is None else size
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in content[:512])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, handler: type) -> None:
        self.hub, self.connections = hub, set()
        super().__init__(("127.0.0.1", 0), handler)

    def get_request(self):
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        pass  # killed clients are not an error of the server

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        # Otherwise, open connections would still be answered.
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    routes: list[tuple[str, re.Pattern, str]] = []

    def log_message(self, *args) -> None:
        pass

    def __getattr__(self, name: str):
        if name in ("do_GET", "do_HEAD", "do_POST", "do_PUT", "do_DELETE"):
            return self.handle_request
        raise AttributeError(name)

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def violation(self, what: str) -> HttpError:
        self.hub.violations.append(f"{self.command} {self.path}: {what}")
        return HttpError(400, message=what)

    def handle_request(self) -> None:
        self.user, self.fault, self.answered = None, self.hub._fault_for(self.command, self.path), None
        try:
            try:
                self.body = self.read_body()
                if self.fault and self.fault.call:
                    self.fault.call()
                if self.fault and self.fault.status:
                    raise HttpError(self.fault.status, message="A fault that was asked for", **{})
                self.authenticate()
                self.dispatch()
            except HttpError as error:
                body = json.dumps({"error": error.message, **error.body}).encode()
                headers = {"Content-Type": "application/json", "X-Error-Message": error.message}
                headers |= {"X-Error-Code": error.code} if error.code else {}
                headers |= self.fault.headers if self.fault and self.fault.status else {}
                self.send(error.status, body, headers)
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True
        finally:
            self.hub.requests.append(
                Request(self.command, self.path, self.user.name if self.user else None, self.answered or 0)
            )

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length", 0))
        if self.fault and self.fault.cut and self.command in ("PUT", "POST"):
            self.rfile.read(size // 2)
            self.cut()
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client went away")
        return body

    def cut(self) -> None:
        """End the connection, normally or with a reset."""
        if self.fault.cut == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR) if self.fault.cut == "fin" else self.connection.close()
        raise ConnectionError("cut as asked for")

    def dispatch(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = urllib.parse.parse_qs(query, keep_blank_values=True)
        for method, pattern, name in self.routes:
            match = pattern.fullmatch(path)
            if match and self.command in method.split():
                values = {k: urllib.parse.unquote(v) for k, v in match.groupdict().items() if v is not None}
                getattr(self, name)(**values)
                return
        raise self.violation("unknown to this server")

    def json(self, *required: str) -> dict:
        try:
            payload = json.loads(self.body)
        except ValueError as error:
            raise self.violation("a body that is no JSON") from error
        missing = [key for key in required if key not in payload]
        if missing:
            raise self.violation(f"without {missing}")
        return payload

    def send_json(self, value, status: int = 200, headers: dict | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        fault, self.answered = self.fault, status
        if fault and fault.corrupt and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault and fault.lose_answer:
            fault.cut = "fin"
            self.cut()
        self.send_response(status)
        headers = headers or {}
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.cut:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.cut()
        self.wfile.write(body)

    def send_content(self, content: bytes, headers: dict) -> None:
        """Send a file, or the requested part of it."""
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        if self.command == "HEAD":
            return self.send(200, b"", {**headers, "Content-Length": str(len(content))})
        if not requested:
            return self.send(200, content, headers)
        first, last = int(requested[1]), min(int(requested[2] or len(content) - 1), len(content) - 1)
        if first >= len(content):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(206, content[first : last + 1], headers)


def route(method: str, pattern: str):
    def mark(function):
        function.route = (method, re.compile(pattern))
        return function

    return mark


def routed(handler: type) -> type:
    handler.routes = [(*f.route, name) for name, f in vars(handler).items() if hasattr(f, "route")]
    return handler


@routed
class _HubHandler(_Handler):
    # Authentication and permissions

    def authenticate(self) -> None:
        token = self.headers.get("Authorization", "")
        if not token:
            return
        self.user = self.hub.users.get(token.removeprefix("Bearer "))
        if self.user is None:
            raise HttpError(401, message="Invalid credentials in Authorization header")

    def writer(self) -> User:
        if self.user is None:
            raise HttpError(401, message="Invalid username or password.")
        if not self.user.can_write:
            raise HttpError(403, message="This token may not write")
        return self.user

    def find(self, kind: str, repo: str, write: bool = False) -> Repo:
        found = self.hub.repos.get((kind, repo))
        is_owner = found is not None and self.user is not None and self.user.name == found.owner
        if found is None or (found.private and not is_owner):
            status = 404 if self.user else 401
            raise HttpError(status, "RepoNotFound", "Repository not found")
        if write and not (self.writer() and is_owner):
            raise HttpError(403, message="You do not have write access to this repository")
        return found

    def find_commit(self, repo: Repo, rev: str) -> Commit:
        oid = repo.resolve(rev)
        if oid is None:
            raise HttpError(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return repo.commits[oid]

    def check_gate(self, repo: Repo) -> None:
        if repo.gated and (self.user is None or self.user.name != repo.owner):
            status = 403 if self.user else 401
            raise HttpError(status, "GatedRepo", f"Access to {repo.kind[:-1]} {repo.id} is restricted")

    # Users and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if self.user is None:
            raise HttpError(401, message="Invalid username or password.")
        role = "write" if self.user.can_write else "read"
        self.send_json(
            {
                "type": "user",
                "name": self.user.name,
                "fullname": self.user.name.title(),
                "email": f"{self.user.name}@example.com",
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
            }
        )

    @route("GET", API + "/auth-check(?P<write>/write)?")
    def auth_check(self, kind: str, repo: str, write: str | None = None) -> None:
        self.check_gate(self.find(kind, repo, write=write is not None))
        self.send_json({})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        user, payload = self.writer(), self.json("name")
        unknown = set(payload) - {"name", "organization", "type", "visibility", "private", "sdk"}
        if unknown:
            raise self.violation(f"unknown {sorted(unknown)}")
        if (payload.get("type") == "space") != (payload.get("sdk") in SPACE_SDKS):
            raise self.violation(f"sdk {payload.get('sdk')!r} for a {payload.get('type', 'model')}")
        owner = payload.get("organization") or user.name
        if owner != user.name:
            raise HttpError(403, message=f"You don't have the rights to create a repo under {owner}")
        kind, repo_id = payload.get("type", "model") + "s", f"{owner}/{payload['name']}"
        url = f"{self.hub.endpoint}/{prefix_of(kind)}{repo_id}"
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repos:
                raise HttpError(409, message="You already created this repo", url=url)
            private = payload.get("visibility") == "private" or payload.get("private") is True
            repo = self.hub.repos[kind, repo_id] = Repo(kind, repo_id, private)
            repo.add("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.send_json({"url": url, "name": repo_id, "id": repo_id})

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        payload = self.json("name")
        repo_id = f"{payload.get('organization') or self.writer().name}/{payload['name']}"
        repo = self.find(payload.get("type", "model") + "s", repo_id, write=True)
        del self.hub.repos[repo.kind, repo.id]
        self.send_json({})

    @route("PUT", API + "/settings")
    def settings(self, kind: str, repo: str) -> None:
        found, payload = self.find(kind, repo, write=True), self.json()
        if "visibility" in payload:
            found.private = payload["visibility"] == "private"
        if "gated" in payload:
            found.gated = bool(payload["gated"])
        self.send_json({"private": found.private, "gated": found.gated})

    @route("GET", API + f"(/revision/{REV})?")
    def info(self, kind: str, repo: str, rev: str = "main") -> None:
        found = self.find(kind, repo)
        commit = self.find_commit(found, rev)
        card = card_data(commit.files["README.md"].content) if "README.md" in commit.files else {}
        with_blobs = "blobs" in self.query
        siblings = []
        for path, blob in sorted(commit.files.items()):
            row = {"rfilename": path}
            if with_blobs:
                row |= {"size": len(blob.content), "blobId": blob.oid}
                row |= {"lfs": blob.row(path)["lfs"] | {"sha256": blob.sha256}} if blob.is_lfs else {}
            siblings.append(row)
        self.send_json(
            {
                "_id": hashlib.sha1(found.id.encode()).hexdigest()[:24],
                "id": found.id,
                "author": found.owner,
                "sha": commit.oid,
                "private": found.private,
                "gated": "auto" if found.gated else False,
                "disabled": False,
                "tags": card.get("tags", []),
                "cardData": card,
                "siblings": siblings,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        )

    @route("GET", API + "/refs")
    def refs(self, kind: str, repo: str) -> None:
        found = self.find(kind, repo)
        self.send_json(
            {
                "branches": [
                    {"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in found.branches.items()
                ],
                "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in found.tags.items()],
                "converts": [],
                "pullRequests": [],
            }
        )

    @route("POST", API + f"/branch/{REV}")
    def branch(self, kind: str, repo: str, rev: str) -> None:
        found = self.find(kind, repo, write=True)
        payload = self.json()
        if rev in found.branches:
            raise HttpError(409, message="Reference already exists")
        found.branches[rev] = self.find_commit(found, payload.get("startingPoint", "main")).oid
        self.send_json({})

    @route("POST", API + f"/tag/{REV}")
    def tag(self, kind: str, repo: str, rev: str) -> None:
        found = self.find(kind, repo, write=True)
        name = self.json("tag")["tag"]
        if name in found.tags:
            raise HttpError(409, message="Tag reference exists already")
        found.tags[name] = self.find_commit(found, rev).oid
        self.send_json({})

    # Reading

    @route("GET", API + f"/tree/{REV}(?P<path>/.+)?")
    def tree(self, kind: str, repo: str, rev: str, path: str = "") -> None:
        found = self.find(kind, repo)
        self.check_gate(found)
        commit, path = self.find_commit(found, rev), path.strip("/")
        is_recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rows, folders = [], {}
        for name, blob in sorted(commit.files.items()):
            if path and not name.startswith(path + "/"):
                continue
            inner = name[len(path) + 1 if path else 0 :].split("/")
            parents = ["/".join(inner[:depth]) for depth in range(1, len(inner))]
            for parent in parents if is_recursive else parents[:1]:
                folder = f"{path}/{parent}" if path else parent
                folders[folder] = {"type": "directory", "oid": hash_of(folder), "size": 0, "path": folder}
            if is_recursive or len(inner) == 1:
                rows.append(blob.row(name) | self.expanded(commit))
        if path and not rows and not folders:
            raise HttpError(404, "EntryNotFound", f"{path} does not exist")
        rows = [*(folder | self.expanded(commit) for folder in folders.values()), *rows]
        start = int(self.query.get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        headers = {}
        if end < len(rows):
            query = {k: v[0] for k, v in self.query.items()} | {"cursor": str(end)}
            url = f"{self.hub.endpoint}{self.path.partition('?')[0]}?{urllib.parse.urlencode(query)}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.send_json(rows[start:end], headers=headers)

    @route("POST", API + f"/paths-info/{REV}")
    def paths_info(self, kind: str, repo: str, rev: str) -> None:
        found = self.find(kind, repo)
        self.check_gate(found)
        commit = self.find_commit(found, rev)
        if "json" in self.headers.get("Content-Type", ""):
            paths = self.json("paths")["paths"]
        else:
            paths = urllib.parse.parse_qs(self.body.decode()).get("paths", [])
        rows = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in commit.files:
                rows.append(commit.files[path].row(path) | self.expanded(commit))
            elif any(name.startswith(path + "/") for name in commit.files):
                row = {"type": "directory", "oid": hash_of(path), "size": 0, "path": path}
                rows.append(row | self.expanded(commit))
        self.send_json(rows)

    def expanded(self, commit: Commit) -> dict:
        return {"lastCommit": {"id": commit.oid, "title": commit.title, "date": "2026-01-01T00:00:00.000Z"}}

    @route("GET HEAD", FILES + f"/resolve/{REV}/(?P<path>.+)")
    def resolve(self, repo: str, rev: str, path: str, prefix: str = "") -> None:
        found = self.find(prefix.rstrip("/") or "models", repo)
        commit = self.find_commit(found, rev)
        self.check_gate(found)
        if path not in commit.files:
            raise HttpError(404, "EntryNotFound", f"{path} does not exist")
        blob, headers = commit.files[path], {"X-Repo-Commit": commit.oid}
        if not blob.is_lfs:
            return self.send_content(blob.content, {**headers, "ETag": f'"{blob.oid}"'})
        headers |= {
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(len(blob.content)),
            "Location": f"{self.hub.objects_endpoint}/{blob.sha256}?{urllib.parse.urlencode({'path': path})}",
        }
        self.send(302, b"", headers)

    # Publishing

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        payload = self.json("content", "repoType")
        check = space_problem if payload["repoType"] == "space" else card_problem
        problem = check(payload["content"].encode())
        if problem:
            raise HttpError(400, message=problem, errors=[{"message": problem}], warnings=[])
        self.send_json({"errors": [], "warnings": []})

    @property
    def is_proposal(self) -> bool:
        """Whether the commit is for a pull request, which every reader may open."""
        return self.query.get("create_pr") == ["1"] and self.writer() is not None

    @route("POST", API + f"/preupload/{REV}")
    def preupload(self, kind: str, repo: str, rev: str) -> None:
        found, payload = self.find(kind, repo, write=not self.is_proposal), self.json("files")
        commit = self.find_commit(found, rev)
        answers = []
        for file in payload["files"]:
            if set(file) != {"path", "sample", "size"} or not isinstance(file["size"], int):
                raise self.violation(f"file {sorted(file)}")
            self.check_path(file["path"])
            sample, old = base64.b64decode(file["sample"], validate=True), commit.files.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"], sample, file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None if old is None else old.sha256 if old.is_lfs else old.oid,
                }
            )
        self.send_json({"files": answers})

    def check_path(self, path: str) -> None:
        if not path or path.startswith("/") or ".." in path.split("/") or path.startswith(".git/"):
            raise self.violation(f"path {path!r}")

    @route("POST", FILES + r"\.git/info/lfs/objects/batch")
    def batch(self, repo: str, prefix: str = "") -> None:
        self.find(prefix.rstrip("/") or "models", repo)
        self.writer()  # of a pull request, perhaps
        payload = self.json("operation", "objects", "hash_algo")
        if payload["operation"] != "upload" or payload["hash_algo"] != "sha256":
            raise self.violation("no upload by sha256")
        objects = []
        for wanted in payload["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not re.fullmatch("[0-9a-f]{64}", wanted["oid"]):
                raise self.violation(f"object {wanted['oid']!r}")
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.objects_endpoint}/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.endpoint}/{prefix}{repo}.git/info/lfs/verify"},
                }
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    @route("POST", FILES + r"\.git/info/lfs/verify")
    def verify(self, repo: str, prefix: str = "") -> None:
        self.find(prefix.rstrip("/") or "models", repo)
        self.writer()  # of a pull request, perhaps
        payload = self.json("oid", "size")
        if len(self.hub.objects.get(payload["oid"], b"")) != payload["size"]:
            raise HttpError(422, message="The object is not there, or of another size")
        self.send_json({})

    @route("POST", API + f"/commit/{REV}")
    def commit(self, kind: str, repo: str, rev: str) -> None:
        found = self.find(kind, repo, write=not self.is_proposal)
        if "ndjson" not in self.headers.get("Content-Type", ""):
            raise self.violation("a commit that is no newline-delimited JSON")
        try:
            header, *operations = [json.loads(line) for line in self.body.splitlines() if line]
        except ValueError as error:
            raise self.violation("lines that are no JSON") from error
        if header.get("key") != "header" or not header["value"].get("summary"):
            raise self.violation("a commit without a summary")
        if not operations:
            raise self.violation("an empty commit")
        with self.hub.lock:
            if rev not in found.branches:
                raise HttpError(404, "RevisionNotFound", f"Invalid rev id: {rev}")
            branch, head, parent = rev, found.branches[rev], header["value"].get("parentCommit")
            number = 1 + sum(name.startswith("refs/pr/") for name in found.branches)
            if self.is_proposal:
                branch, head = f"refs/pr/{number}", parent or head
                found.branches[branch] = head
            if parent is not None and parent != head:
                raise HttpError(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(found.commits[head].files)
            for operation in operations:
                self.apply(operation, files)
            check = space_problem if kind == "spaces" else card_problem
            if "README.md" in files and (problem := check(files["README.md"].content)):
                raise HttpError(400, message=problem)
            commit = found.add(branch, files, header["value"]["summary"])
        page = f"{self.hub.endpoint}/{prefix_of(kind)}{repo}"
        answer = {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{page}/commit/{commit.oid}",
            "hookOutput": "",
        }
        self.send_json(answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if self.is_proposal else {}))

    def apply(self, operation: dict, files: dict[str, Blob]) -> None:
        kind, value = operation.get("key"), operation.get("value", {})
        path = value.get("path", "")
        self.check_path(path)
        if kind == "file":
            try:
                files[path] = Blob(base64.b64decode(value["content"], validate=True), False)
            except (KeyError, binascii.Error) as error:
                raise self.violation(f"content of {path}") from error
        elif kind == "lfsFile":
            content = self.hub.objects.get(value.get("oid"))
            if content is None or value.get("algo") != "sha256" or value.get("size", len(content)) != len(content):
                raise HttpError(400, message=f"LFS pointer of {path} points to an object that does not exist")
            files[path] = Blob(content, True)
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise HttpError(404, "EntryNotFound", f"{path} does not exist")
        elif kind == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise self.violation(f"operation {kind!r}")


@routed
class _ObjectHandler(_Handler):
    """The server of large files: a separate origin, which must never receive a token."""

    def authenticate(self) -> None:
        if "Authorization" in self.headers or "hf_" in self.path:
            raise self.violation("a token was sent to another origin")

    @route("PUT", "/(?P<oid>[0-9a-f]{64})")
    def put_object(self, oid: str) -> None:
        content = self.body
        if hashlib.sha256(content).hexdigest() != oid:
            raise self.violation("content of another checksum")
        self.hub.objects[oid] = content
        self.send(200)

    @route("GET HEAD", "/(?P<oid>[0-9a-f]{64})")
    def get_object(self, oid: str) -> None:
        if oid not in self.hub.objects:
            raise HttpError(404, message="NoSuchKey")
        self.send_content(self.hub.objects[oid], {"ETag": f'"{oid}"'})


def hash_of(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def prefix_of(kind: str) -> str:
    """Return the part before the name of a repository in its address."""
    return "" if kind == "models" else f"{kind}/"


def card_data(content: bytes) -> dict:
    match = re.match(rb"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    return data if isinstance(data, dict) else {}


def card_problem(content: bytes) -> str | None:
    """Return the Hub's objection to the metadata of a README.md, if any."""
    try:
        data = card_data(content)
        json.dumps(data)
    except (yaml.YAMLError, TypeError) as error:
        return f"Invalid metadata in README.md: {error}"
    licence = data.get("license")
    if licence is not None and not re.fullmatch(r"[a-z0-9.-]+", str(licence)):
        return f'"license" must be an identifier, got {licence!r}'
    for model in data.get("model-index", []):
        if "name" not in model:
            return '"model-index[0].name" is required'
        for result in model.get("results", []):
            if "type" not in result.get("task", {}) or not {"name", "type"} <= set(result.get("dataset", {})):
                return '"model-index" results need task.type, dataset.name and dataset.type'
            if not all({"type", "value"} <= set(metric) for metric in result.get("metrics", [])):
                return '"model-index" metrics need type and value'
    return None


def space_problem(content: bytes) -> str | None:
    """Return the Hub's objection to the metadata of a Space's README.md, if any."""
    if problem := card_problem(content):
        return problem
    data = card_data(content)
    if data.get("sdk") not in SPACE_SDKS:
        return f'"sdk" must be one of {SPACE_SDKS}, got {data.get("sdk")!r}'
    for key in ("colorFrom", "colorTo"):
        if data.get(key, "gray") not in SPACE_COLOURS:
            return f'"{key}" must be one of {SPACE_COLOURS}, got {data[key]!r}'
    if not isinstance(data.get("sdk_version", ""), str):
        return f'"sdk_version" must be a string, got {data["sdk_version"]!r}'
    if len(data.get("emoji", "")) > 2:
        return f'"emoji" must be one emoji, got {data["emoji"]!r}'
    if not all(isinstance(data.get(key, []), list) for key in ("models", "datasets", "tags")):
        return '"models", "datasets" and "tags" must be lists'
    return None
