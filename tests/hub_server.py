"""A small Hub on localhost: the HTTP API that the stock `huggingface_hub` client calls, over real storage.

No package on PyPI serves both directions (mirrors have no uploads), hence this one. Storage is git-like: blobs by their
git id, large files by SHA-256, commits by the digest of their tree and parent, branches and pull requests as refs.
Files are *large* when they hold a NUL byte or are a `.safetensors`; these are uploaded through the LFS batch API and
downloaded through a redirect, as on the real Hub. Private repositories look absent to others.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"alice-token": "alice", "bob-token": "bob"}
_REPO = r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
_API = rf"/api/models/{_REPO}"


class HubError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repository:
    """One model repository: refs to commits, and what each commit holds."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)


class Store:
    """Repositories and objects; bytes lie on disk under `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.repositories: dict[str, Repository] = {}
        for kind in ("blobs", "lfs"):
            (root / kind).mkdir(parents=True, exist_ok=True)

    def create(self, repo: str, *, private: bool) -> None:
        self.repositories[repo] = Repository(private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.commit(repo, "refs/heads/main", {".gitattributes": self.add_blob(attributes)}, "initial commit")

    def add_blob(self, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (self.root / "blobs" / oid).write_bytes(data)
        return {"oid": oid, "size": len(data)}

    def add_lfs_pointer(self, oid: str, size: int) -> dict[str, Any]:
        path = self.root / "lfs" / oid
        if not path.is_file() or path.stat().st_size != size:
            raise HubError(400, f"LFS object {oid} was never uploaded")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
        blob = self.add_blob(pointer)
        return {"oid": blob["oid"], "size": size, "lfs": {"oid": oid, "size": size, "pointerSize": len(pointer)}}

    def content(self, entry: dict[str, Any]) -> bytes:
        if "lfs" in entry:
            return (self.root / "lfs" / entry["lfs"]["oid"]).read_bytes()
        return (self.root / "blobs" / entry["oid"]).read_bytes()

    def resolve(self, repo: Repository, revision: str) -> str:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in repo.refs:
                return repo.refs[ref]
        if revision in repo.commits:
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, name: str, ref: str, tree: dict[str, Any], title: str, *, parent: str | None = None) -> str:
        repo = self.repositories[name]
        parent = parent or repo.refs.get(ref)
        record = {"tree": tree, "parent": parent, "title": title, "number": len(repo.commits)}
        oid = hashlib.sha1(json.dumps(record, sort_keys=True).encode()).hexdigest()
        record["date"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        repo.commits[oid] = record
        repo.refs[ref] = oid
        return oid

    def history(self, repo: str, revision: str = "main") -> list[str]:
        """Titles of the commits of `revision`, newest first."""
        found = self.repositories[repo]
        oid: str | None = self.resolve(found, revision)
        titles = []
        while oid is not None:
            titles.append(found.commits[oid]["title"])
            oid = found.commits[oid]["parent"]
        return titles

    def files(self, repo: str, revision: str = "main") -> dict[str, Any]:
        """`{path: entry}` of a revision, without .gitattributes."""
        found = self.repositories[repo]
        tree = found.commits[self.resolve(found, revision)]["tree"]
        return {path: entry for path, entry in tree.items() if path != ".gitattributes"}


class HubServer:
    """The server; use as a context manager. `url` is what HF_ENDPOINT takes, `log` holds (method, path, user).

    The storage refuses large files of the repositories in `closed`.
    """

    def __init__(self, root: Path):
        self.store = Store(root)
        self.lock = threading.Lock()
        self.log: list[tuple[str, str, str | None]] = []
        self.closed: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        # another name, as the real one has: the client follows redirects within one host by itself
        self.cdn = f"http://localhost:{self._http.server_port}/cdn"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        return

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        self.body = self._read()
        try:
            self.user = self._user()
            self.hub.log.append((self.command, parts.path, self.user))
            for methods, pattern, function in _ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in methods:
                    with self.hub.lock:
                        function(self, **{key: unquote(value) for key, value in match.groupdict().items()})
                    return
            raise HubError(404, f"no route for {self.command} {parts.path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.answer({"error": str(error)}, status=error.status, headers=headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(data)

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def answer(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        self.send_response(status)
        for key, text in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repository(self, owner: str, name: str, *, write: bool = False) -> Repository:
        repo = self.hub.store.repositories.get(f"{owner}/{name}")
        if repo is None or (repo.private and self.user != owner):
            status = 404 if self.user else 401
            raise HubError(status, "Repository not found", "RepoNotFound")
        if write and self.user != owner:
            raise HubError(403, f"you need write access to {owner}/{name}")
        return repo

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


def _whoami(self: _Handler) -> None:
    if self.user is None:
        raise HubError(401, "Invalid username or password.")
    self.answer({"type": "user", "name": self.user, "fullname": self.user, "orgs": []})


def _create(self: _Handler) -> None:
    if self.user is None:
        raise HubError(401, "Invalid username or password.")
    wanted = self.json()
    owner = wanted.get("organization") or self.user
    repo = f"{owner}/{wanted['name']}"
    url = f"{self.hub.url}/{repo}"
    if repo in self.hub.store.repositories:
        self.answer({"error": "You already created this model repo", "url": url}, status=409)
        return
    if owner != self.user:
        raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    private = wanted.get("private") or wanted.get("visibility") == "private"
    self.hub.store.create(repo, private=bool(private))
    self.answer({"url": url, "name": repo, "id": repo})


def _info(self: _Handler, owner: str, name: str, revision: str = "main") -> None:
    repo = self.repository(owner, name)
    oid = self.hub.store.resolve(repo, revision)
    tree = repo.commits[oid]["tree"]
    answer = {"_id": "0", "id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": oid, "private": repo.private}
    answer |= {"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in sorted(tree)]}
    if "README.md" in tree:
        text = self.hub.store.content(tree["README.md"]).decode()
        if text.startswith("---\n"):
            answer["cardData"] = yaml.safe_load(text.split("---\n", 2)[1]) or {}
    self.answer(answer)


def _tree(self: _Handler, owner: str, name: str, revision: str, folder: str | None = None) -> None:
    repo = self.repository(owner, name)
    tree = repo.commits[self.hub.store.resolve(repo, revision)]["tree"]
    prefix = f"{folder}/" if folder else ""
    if prefix and not any(path.startswith(prefix) for path in tree):
        raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    listed: dict[str, dict[str, Any]] = {}
    for path, entry in sorted(tree.items()):
        if not path.startswith(prefix):
            continue
        inner = path[len(prefix) :].split("/")
        for depth in range(1, len(inner)):
            above = prefix + "/".join(inner[:depth])
            listed[above] = {"type": "directory", "path": above, "size": 0, "oid": "0" * 40}
        listed[path] = {"type": "file", "path": path, **entry}
    if self.query.get("recursive", "").lower() not in ("true", "1"):
        listed = {path: item for path, item in listed.items() if "/" not in path[len(prefix) :]}
    self.answer(list(listed.values()))


def _paths_info(self: _Handler, owner: str, name: str, revision: str) -> None:
    repo = self.repository(owner, name)
    tree = repo.commits[self.hub.store.resolve(repo, revision)]["tree"]
    wanted = self.json()["paths"]
    self.answer([{"type": "file", "path": path, **tree[path]} for path in wanted if path in tree])


def _branch(self: _Handler, owner: str, name: str, branch: str) -> None:
    repo = self.repository(owner, name, write=True)
    if f"refs/heads/{branch}" in repo.refs:
        raise HubError(409, f"Reference already exists: {branch}")
    start = self.json().get("startingPoint") or "main"
    repo.refs[f"refs/heads/{branch}"] = self.hub.store.resolve(repo, start)
    self.answer({})


def _refs(self: _Handler, owner: str, name: str) -> None:
    repo = self.repository(owner, name)
    listed: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for ref, oid in repo.refs.items():
        kind = "pullRequests" if ref.startswith("refs/pr/") else "branches"
        listed[kind].append({"name": ref.removeprefix("refs/heads/"), "ref": ref, "targetCommit": oid})
    self.answer(listed)


def _commits(self: _Handler, owner: str, name: str, revision: str) -> None:
    repo = self.repository(owner, name)
    oid: str | None = self.hub.store.resolve(repo, revision)
    listed = []
    while oid is not None:
        one = repo.commits[oid]
        listed.append({"id": oid, "authors": [], "date": one["date"], "title": one["title"], "message": ""})
        oid = one["parent"]
    self.answer(listed)


def _preupload(self: _Handler, owner: str, name: str, revision: str) -> None:
    repo = self.repository(owner, name, write=not self.query.get("create_pr"))
    tree = repo.commits[self.hub.store.resolve(repo, revision)]["tree"]
    files = []
    for item in self.json()["files"]:
        path = item["path"]
        large = path.endswith(".safetensors") or b"\0" in base64.b64decode(item["sample"])
        entry = tree.get(path)
        known = None if entry is None else entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        mode = "lfs" if large else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
    self.answer({"files": files})


def _batch(self: _Handler, owner: str, name: str) -> None:
    self.repository(owner, name)
    objects = []
    for item in self.json()["objects"]:
        answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
        if f"{owner}/{name}" in self.hub.closed:
            answer["error"] = {"code": 507, "message": "storage is full"}
        elif not (self.hub.store.root / "lfs" / item["oid"]).is_file():
            href = f"{self.hub.url}/storage/{item['oid']}"
            answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append(answer)
    self.answer({"transfer": "basic", "objects": objects})


def _store(self: _Handler, oid: str) -> None:
    if hashlib.sha256(self.body).hexdigest() != oid:
        raise HubError(400, "the content does not have this digest")
    (self.hub.store.root / "lfs" / oid).write_bytes(self.body)
    self.answer(b"")


def _verify(self: _Handler, oid: str) -> None:
    path = self.hub.store.root / "lfs" / oid
    if not path.is_file() or path.stat().st_size != self.json()["size"]:
        raise HubError(404, "no such object")
    self.answer({})


def _download(self: _Handler, oid: str) -> None:
    self.answer((self.hub.store.root / "lfs" / oid).read_bytes())


def _commit(self: _Handler, owner: str, name: str, revision: str) -> None:
    pull_request = bool(self.query.get("create_pr"))
    repo = self.repository(owner, name, write=not pull_request)
    if self.user is None:
        raise HubError(401, "Invalid username or password.")
    store, repo_id = self.hub.store, f"{owner}/{name}"
    parent = store.resolve(repo, revision)
    if revision in repo.commits:
        raise HubError(400, "commits go to branches")
    tree = dict(repo.commits[parent]["tree"])
    title = ""
    for line in self.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            title = value["summary"]
        elif item["key"] == "file":
            tree[value["path"]] = store.add_blob(base64.b64decode(value["content"]))
        elif item["key"] == "lfsFile":
            tree[value["path"]] = store.add_lfs_pointer(value["oid"], value["size"])
        elif item["key"] == "deletedFile":
            if tree.pop(value["path"], None) is None:
                raise HubError(404, f"{value['path']} is not there to delete", "EntryNotFound")
        else:
            raise HubError(400, f"unknown operation {item['key']}")
    number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
    ref = f"refs/pr/{number}" if pull_request else revision if "/" in revision else f"refs/heads/{revision}"
    if not pull_request and ref not in repo.refs:
        ref = f"refs/heads/{revision}"
    oid = store.commit(repo_id, ref, tree, title, parent=parent)
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}
    if pull_request:
        answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
    self.answer(answer)


def _validate_yaml(self: _Handler) -> None:
    text = self.json()["content"]
    errors = []
    try:
        front = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
        if not isinstance(front or {}, dict):
            errors.append({"message": "the metadata must be a mapping"})
        for model in (front or {}).get("model-index") or []:
            for result in model["results"]:
                if not {"task", "dataset", "metrics"} <= set(result) or "type" not in result["dataset"]:
                    errors.append({"message": f"malformed result {result}"})
    except (yaml.YAMLError, KeyError, TypeError) as error:
        errors.append({"message": str(error)})
    self.answer({"errors": errors, "warnings": []}, status=400 if errors else 200)


def _resolve(self: _Handler, owner: str, name: str, revision: str, path: str) -> None:
    repo = self.repository(owner, name)
    oid = self.hub.store.resolve(repo, revision)
    entry = repo.commits[oid]["tree"].get(path)
    headers = {"X-Repo-Commit": oid}
    if entry is None:
        code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        self.answer({"error": "Entry not found"}, status=404, headers=headers | code)
        return
    if "lfs" in entry:
        large = entry["lfs"]
        headers |= {"X-Linked-Etag": f'"{large["oid"]}"', "X-Linked-Size": str(large["size"])}
        self.answer(b"", status=302, headers={**headers, "Location": f"{self.hub.cdn}/{large['oid']}"})
        return
    self.answer(self.hub.store.content(entry), headers={**headers, "ETag": f'"{entry["oid"]}"'})


_READ = ("GET", "HEAD")
_OID = r"(?P<oid>[0-9a-f]{64})"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), "/api/whoami-v2", _whoami),
    (("POST",), "/api/repos/create", _create),
    (("POST",), "/api/validate-yaml", _validate_yaml),
    (("GET",), _API, _info),
    (("GET",), rf"{_API}/revision/{_REVISION}", _info),
    (("GET",), rf"{_API}/tree/{_REVISION}", _tree),
    (("GET",), rf"{_API}/tree/{_REVISION}/(?P<folder>.+)", _tree),
    (("POST",), rf"{_API}/paths-info/{_REVISION}", _paths_info),
    (("POST",), rf"{_API}/branch/(?P<branch>[^/]+)", _branch),
    (("GET",), rf"{_API}/refs", _refs),
    (("GET",), rf"{_API}/commits/{_REVISION}", _commits),
    (("POST",), rf"{_API}/preupload/{_REVISION}", _preupload),
    (("POST",), rf"{_API}/commit/{_REVISION}", _commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _batch),
    (("PUT",), rf"/storage/{_OID}", _store),
    (("POST",), rf"/storage/{_OID}/verify", _verify),
    (_READ, rf"/cdn/{_OID}", _download),
    (_READ, rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
]
