"""A stand-in for the Hugging Face hub: a real HTTP server with as much of its API as the product asks for.

Repositories are dictionaries of files. Small files go into a commit, larger ones through the LFS API, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
LARGE = 100_000  # bytes from which on a file goes through the LFS API


@dataclass
class Repository:
    """A repository: its files, and what its page says."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool | str = False
    accepted: bool = True  # whether the account of TOKEN has accepted the licence
    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        """The commit: another content is another one."""
        content = "".join(f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(self.files.items()))
        return hashlib.sha1(content.encode()).hexdigest()


def git_id(data: bytes) -> str:
    """Git's name of a content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
    """Repositories by name, data sets with `datasets/` before it. `requests` has "METHOD path" of each request, `damage` changes what an upload leaves, and
    with `store_refuses` the store of large files takes none.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.damage: dict[str, bytes] = {}
        self.store_refuses = False

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT says."""
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, value: Any = None, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):
            if self.server.store_refuses:
                self.refuse(403, "AccessDenied")
            else:
                self.server.uploaded[path.removeprefix("/lfs/")] = data
                self.reply()
        elif path == "/api/repos/create":
            self.create(json.loads(data))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(data))
        else:
            self.api(path, data)

    do_PUT = do_GET = do_HEAD = do_POST

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if not self.authorized:
            self.refuse(401, "Unauthorized")
        elif name in self.server.repositories:
            self.reply({"url": f"{self.server.endpoint}/{name}"}, 409)
        else:
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.server.repositories[name] = Repository({".gitattributes": b"*"}, private=private)
            self.reply({"url": f"{self.server.endpoint}/{name}"})

    def batch(self, asked: dict[str, Any]) -> None:
        place = f"{self.server.endpoint}/lfs/"
        objects = [{**one, "actions": {"upload": {"href": place + one["oid"]}}} for one in asked["objects"]]
        self.reply({"transfer": "basic", "objects": objects})

    def api(self, path: str, data: bytes) -> None:
        own = path.removeprefix("/api").removeprefix("/models").strip("/")
        name = "/".join(own.split("/")[: 3 if own.startswith("datasets/") else 2])
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.authorized):
            self.refuse(404 if self.authorized else 401, "RepoNotFound")
            return
        rest = own.removeprefix(name)
        if path.startswith("/api/"):
            if rest.startswith("/preupload/"):
                files = json.loads(data)["files"]
                self.reply({"files": [
                    {"path": one["path"], "uploadMode": "lfs" if one["size"] >= LARGE else "regular", "shouldIgnore": False}
                    for one in files
                ]})  # fmt: skip
            elif rest.startswith("/commit/"):
                self.commit(repository, name, data)
            elif rest.startswith("/tree/"):
                self.reply(self.tree(repository, "/".join(rest.split("/")[3:])))
            elif rest.startswith("/paths-info/"):
                asked = self.form(data)
                self.reply([self.entry(one, repository) for one in asked if one in repository.files])
            else:
                siblings = [{"rfilename": one, "size": len(content)} for one, content in repository.files.items()]
                self.reply({
                    "id": name.removeprefix("datasets/"), "sha": repository.sha, "siblings": siblings, "gated": repository.gated,
                    "private": repository.private, "tags": [], "cardData": repository.card,
                })  # fmt: skip
        else:
            file = rest.split("/resolve/", 1)[1].split("/", 1)[1]
            if repository.gated and not (self.authorized and repository.accepted):
                self.refuse(403 if self.authorized else 401, "GatedRepo")
            elif file not in repository.files:
                self.refuse(404, "EntryNotFound")
            else:
                content = repository.files[file]
                self.reply(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=repository.sha)

    @staticmethod
    def form(data: bytes) -> list[str]:
        try:
            return json.loads(data)["paths"]
        except ValueError:
            from urllib.parse import parse_qs

            return parse_qs(data.decode())["paths"]

    @staticmethod
    def entry(name: str, repository: Repository) -> dict[str, Any]:
        content = repository.files[name]
        found: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_id(content)}
        if len(content) >= LARGE:
            digest = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return found

    def tree(self, repository: Repository, folder: str) -> list[dict[str, Any]]:
        """What is in a folder; with everything below it if that is asked for."""
        start = f"{folder}/" if folder else ""
        inside = [one for one in repository.files if one.startswith(start)]
        parents = [str(parent) for one in inside for parent in PurePosixPath(one).parents]
        folders = [one for one in dict.fromkeys(parents) if one.startswith(start) and one not in (".", folder)]
        if "recursive=true" not in self.path.lower():
            inside, folders = (
                [one for one in each if "/" not in one.removeprefix(start)] for each in (inside, folders)
            )
        directories = [{"type": "directory", "path": one, "size": 0, "oid": "e" * 40} for one in folders]
        return directories + [self.entry(one, repository) for one in inside]

    def commit(self, repository: Repository, name: str, data: bytes) -> None:
        if not self.authorized:
            self.refuse(403, "Forbidden")
            return
        for line in data.decode().splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.uploaded[value["oid"]]
            elif one["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.files.update(
            {path: content for path, content in self.server.damage.items() if path in repository.files}
        )
        self.reply({"commitUrl": f"{self.server.endpoint}/{name}/commit/{repository.sha}", "commitOid": repository.sha})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a port of this machine while the block runs."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
