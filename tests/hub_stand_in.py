"""A stand-in for the Hugging Face Hub on loopback: model repositories with revisions in memory, and faults on order.

Enough of the protocol for huggingface_hub to make repositories and branches, to commit, with or without LFS, and to
download. Also a program, for scripts: `python tests/hub_stand_in.py` prints the variables to export.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "standin" * 5


@dataclass
class Fault:
    """What happens to the next `times` requests whose `METHOD /path` matches."""

    pattern: str
    status: int | None = None
    """Answer this status; None: close the connection without an answer."""
    times: int = 1
    after: bool = False
    """Do what was asked, then fail."""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Commit:
    """A state of a branch."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Branches of commits, oldest first."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch or of an id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


class HubStandIn:
    """The server; its state may be read and changed while it runs."""

    def __init__(self, *, lfs: bool = False, role: str = "write") -> None:
        self.lfs, self.role = lfs, role
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, bytes]] = []
        self.namespaces = ["tester", "lab"]
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[HubStandIn]:
        """Serve inside the block."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def environment(self, home: str) -> dict[str, str]:
        """Variables for a client process; LFS instead of Xet, which has a server of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": home,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a revision."""
        found = self.repositories[repo].find(revision)
        assert found is not None
        return found.files

    def commits(self, repo: str, revision: str = "main") -> list[str]:
        """Messages of a branch, oldest first."""
        return [commit.message for commit in self.repositories[repo].branches[revision]]

    def fault(self, line: str) -> Fault | None:
        """The fault that a request meets, counted down."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: HubStandIn

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _handle(self) -> None:
        address = urlsplit(self.path)
        self.route, self.query = unquote(address.path), parse_qs(address.query)
        self.data = self._body() if self.command in ("POST", "PUT", "DELETE") else b""
        line = f"{self.command} {self.route}"
        self.stand_in.requests.append((line, self.data))
        self.muted = False
        fault = self.stand_in.fault(line)
        if fault is None:
            self._answer()
            return
        if fault.after:
            self.muted = True
            self._answer()
            self.muted = False
        if fault.status is None:
            self.close_connection = True
            self.connection.close()
        else:
            self._send(fault.status, {"error": "injected"}, headers=fault.headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, status: int, value: Any = None, *, raw: bytes | None = None, headers: Any = None) -> None:
        if self.muted:
            return
        body = raw if raw is not None else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/json" if raw is None else "application/octet-stream"
        for name, text in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, {"error": message}, headers={"X-Error-Code": code, "X-Error-Message": message})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _answer(self) -> None:
        hub = self.stand_in
        if self.route == "/api/validate-yaml":
            ok = b"license: nonsense" not in self.data
            self._send(200 if ok else 400, {"errors": [] if ok else [{"message": "license is wrong"}], "warnings": []})
        elif self.route.startswith("/lfs/"):
            hub.objects[self.route.rpartition("/")[2]] = self.data
            self._send(200, {})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.route):
            self._lfs_batch()
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.route):
            self._file(*match.groups())
        elif not self._known:
            self._refuse(401, "", "Invalid username or password.")
        elif self.route == "/api/whoami-v2":
            token = {"role": hub.role, "displayName": "test"}
            self._send(200, {"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": token}})
        elif self.route == "/api/repos/create":
            self._create()
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", self.route):
            self._models(match[1], match[2] or "")
        else:
            self._refuse(404, "", f"nothing at {self.route}")

    def _create(self) -> None:
        hub, asked = self.stand_in, json.loads(self.data)
        namespace = asked.get("organization") or "tester"
        name = f"{namespace}/{asked['name']}"
        address = {"url": f"{hub.endpoint}/{name}", "name": name, "id": name}
        if namespace not in hub.namespaces:
            self._refuse(403, "", f"You don't have the rights to create a model under the namespace {namespace}")
        elif name in hub.repositories:
            self._send(409, {"error": "You already created this model repo", **address})
        else:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            repository = hub.repositories[name] = Repository(private)
            repository.branches["main"] = [Commit(_oid(name), "initial commit", {".gitattributes": b""})]
            self._send(200, address)

    def _models(self, name: str, rest: str) -> None:
        repository = self.stand_in.repositories.get(name)
        verb, _, revision = rest.partition("/")
        if repository is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif verb == "branch" and self.command == "POST":
            if revision in repository.branches:
                self._refuse(409, "", f"Reference already exists: {revision}")
            else:
                repository.branches[revision] = [repository.branches["main"][-1]]
                self._send(200, {})
        elif verb == "refs":
            named = repository.branches.items()
            rows = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c[-1].oid} for n, c in named]
            self._send(200, {"branches": rows, "tags": [], "converts": []})
        elif verb in ("preupload", "commit", "tree", "revision", ""):
            revision = revision.split("/")[0] or "main"
            found = repository.find(revision)
            if found is None:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                getattr(self, f"_{verb or 'revision'}")(name, repository, revision, found)
        else:
            self._refuse(404, "", f"nothing at {self.route}")

    def _preupload(self, _name: str, _repository: Repository, _revision: str, found: Commit) -> None:
        rows = []
        for file in json.loads(self.data)["files"]:
            content, big = found.files.get(file["path"]), file["path"].endswith((".safetensors", ".gguf", ".onnx"))
            mode = "lfs" if big and self.stand_in.lfs else "regular"
            oid = None if content is None else _sha256(content) if mode == "lfs" else _git_oid(content)
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": rows})

    def _commit(self, name: str, repository: Repository, revision: str, found: Commit) -> None:
        head, *items = [json.loads(line) for line in self.data.splitlines() if line.strip()]
        parent = head["value"].get("parentCommit")
        if parent and parent != found.oid:
            self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        files = dict(found.files)
        for item in items:
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.stand_in.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commits = repository.branches[revision]
        oid = _oid(f"{revision} {len(commits)} {found.oid}")
        commits.append(Commit(oid, head["value"]["summary"], files))
        self._send(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.stand_in.endpoint}/{name}/commit/{oid}"}
        )

    def _tree(self, _name: str, _repository: Repository, _revision: str, found: Commit) -> None:
        rows = []
        for path, content in sorted(found.files.items()):
            row = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            if path.endswith(".safetensors") and self.stand_in.lfs:
                row["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
            rows.append(row)
        self._send(200, rows)

    def _revision(self, name: str, repository: Repository, _revision: str, found: Commit) -> None:
        siblings = [{"rfilename": path, "size": len(content)} for path, content in sorted(found.files.items())]
        about = {"_id": "1", "id": name, "modelId": name, "sha": found.oid, "private": repository.private, "tags": []}
        self._send(200, {**about, "downloads": 0, "likes": 0, "siblings": siblings})

    def _lfs_batch(self) -> None:
        rows = []
        for wanted in json.loads(self.data)["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.stand_in.objects:
                row["actions"] = {"upload": {"href": f"{self.stand_in.endpoint}/lfs/{wanted['oid']}"}}
            rows.append(row)
        self._send(200, {"transfer": "basic", "objects": rows})

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self.stand_in.repositories.get(name)
        if repository is None or (repository.private and not self._known):
            self._refuse(404, "RepoNotFound", "Repository not found")
            return
        found = repository.find(revision)
        if found is None or path not in found.files:
            self._refuse(404, "RevisionNotFound" if found is None else "EntryNotFound", "not there")
            return
        content = found.files[path]
        headers = {"X-Repo-Commit": found.oid, "ETag": f'"{_git_oid(content)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, raw=content, headers=headers)
            return
        first, last = int(asked[1]), int(asked[2]) if asked[2] else len(content) - 1
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, raw=content[first : last + 1], headers=headers)


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    import sys

    with HubStandIn().running() as stand_in:
        for variable, value in stand_in.environment(sys.argv[1] if len(sys.argv) > 1 else "hub-home").items():
            print(f"export {variable}={value}", flush=True)
        threading.Event().wait()
