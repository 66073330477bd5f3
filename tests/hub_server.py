"""A Hub on loopback for tests: the routes that the official client uses, in memory, with faults on demand.

It has two users, Alice and Bob, and an organisation that Alice may write to and Bob may read. It serves private
repositories, branches, tags, pull requests, and uploads without Xet; routes of Xet get a 404.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

ALICE, READER = "hf_aliceMayWrite000000000", "hf_aliceMayOnlyRead000000"
BOB, ME = "hf_bobMayWrite00000000000", "hf_meMyselfAndI000000000"
USERS = {ALICE: ("alice", "write"), READER: ("alice", "read"), BOB: ("bob", "write"), ME: ("me", "write")}
MEMBERS = {"acme": {"alice": "write", "bob": "read"}}
_LFS = re.compile(r"\.(safetensors|png|bin)$")


@dataclass
class Repo:
    """A repository: commits by id, each with its whole content, and the refs that point at them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.messages[oid] = files, message
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request or id stands for."""
        if revision in self.commits:
            return revision
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((self.refs[name] for name in names if name in self.refs), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content at a revision."""
        oid = self.find(revision)
        assert oid is not None, f"no revision {revision} among {list(self.refs)}"
        return self.commits[oid]

    def history(self, revision: str = "main") -> int:
        """Number of commits, without the first empty one."""
        return len(self.commits) - 1


@dataclass
class Fault:
    """A fault that replaces an answer, at most ``times`` times.

    ``action`` is a status code; ``drop``, which closes the connection; ``lose``, which carries out the request and then
    closes it; ``hang``, which stays silent until the server ends; a text, which is sent as a 400 of the metadata check;
    or a function, which is called before the answer.
    """

    route: str
    action: Any
    times: int = 10**6
    seen: int = 0


class HubServer(ThreadingHTTPServer):
    """The server; ``with HubServer() as hub`` runs it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.headers: dict[str, str] = {}  # sent with every failure
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.ending = threading.Event()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.ending.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""

    def fault(self, route: str, action: Any, times: int = 10**6) -> Fault:
        """Answer requests whose ``METHOD path`` matches the expression ``route`` with a fault."""
        self.faults.append(Fault(route, action, times))
        return self.faults[-1]

    def mend(self) -> None:
        """Remove all faults, and clear the list of requests."""
        self.ending.set()
        self.ending = threading.Event()
        self.faults.clear()
        self.requests.clear()

    def asked(self, route: str) -> int:
        """How many requests matched ``route``."""
        return sum(bool(re.search(route, line)) for line in self.requests)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", **extra: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.extra = status, code, extra


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        line = f"{self.command} {unquote(url.path)}"
        self.lost = False
        with hub.lock:
            hub.requests.append(line)
            fault = next((f for f in hub.faults if f.seen < f.times and re.search(f.route, line)), None)
            if fault:
                fault.seen += 1
        try:
            if fault:
                self.misbehave(fault)
            for method, pattern, name in _ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found and self.command in method.split():
                    with hub.lock:
                        return getattr(self, name)(*map(unquote, found.groups()))
            raise _Refused(404, "Not Found")
        except _Refused as refused:
            self.answer({"error": str(refused), **refused.extra}, refused.status, code=refused.code)
        except ConnectionAbortedError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def misbehave(self, fault: Fault) -> None:
        if isinstance(fault.action, int):
            raise _Refused(fault.action, f"injected {fault.action}")
        if fault.action == "drop":
            raise ConnectionAbortedError
        if fault.action == "hang":
            self.server.ending.wait()
            raise ConnectionAbortedError
        if fault.action == "lose":
            self.lost = True
        elif callable(fault.action):
            fault.action()
        else:
            raise _Refused(400, "invalid metadata", errors=[{"message": fault.action}], warnings=[])

    def answer(self, body: Any = None, status: int = 200, code: str = "", **headers: str) -> None:
        if self.lost:
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", str(body["error"]))
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        for name, value in {**headers, **(self.server.headers if status >= 400 else {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who may do what

    def user(self, needed: bool = True) -> tuple[str, str]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Refused(401, f"Invalid credentials in Authorization header (got {token})")
        if not token and needed:
            raise _Refused(401, "Invalid username or password.")
        return USERS.get(token, ("", ""))

    def may_write(self, namespace: str) -> bool:
        name, role = self.user()
        return role == "write" and (namespace == name or MEMBERS.get(namespace, {}).get(name) == "write")

    def repo(self, namespace: str, name: str, write: bool = False) -> Repo:
        user = self.user(needed=False)[0]
        repo = self.server.repos.get(f"{namespace}/{name}")
        visible = repo and (not repo.private or user == namespace or user in MEMBERS.get(namespace, {}))
        if not repo or not visible:
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not self.may_write(namespace):
            raise _Refused(403, "Forbidden: you are not allowed to write here")
        return repo

    def at(self, repo: Repo, revision: str) -> str:
        oid = repo.find(revision)
        if oid is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    @property
    def as_pr(self) -> bool:
        return self.query.get("create_pr") == ["1"]

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    # --- routes

    def whoami(self) -> None:
        name, role = self.user()
        orgs = [{"type": "org", "name": org, "roleInOrg": who[name]} for org, who in MEMBERS.items() if name in who]
        access = {"displayName": "test", "role": role}
        self.answer({"type": "user", "name": name, "fullname": name, "orgs": orgs, "auth": {"accessToken": access}})

    def create(self) -> None:
        asked, (user, _) = self.json(), self.user()
        namespace = asked.get("organization") or user
        name = f"{namespace}/{asked['name']}"
        if not self.may_write(namespace):
            raise _Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repos:
            raise _Refused(409, "You already created this model repo", url=url)
        self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
        self.server.repos[name].commit("refs/heads/main", {".gitattributes": b""}, "initial commit")
        self.answer({"url": url})

    def delete(self) -> None:
        asked, (user, _) = self.json(), self.user()
        namespace = asked.get("organization") or user
        self.repo(namespace, asked["name"], write=True)
        del self.server.repos[f"{namespace}/{asked['name']}"]
        self.answer()

    def validate(self) -> None:
        head = self.json()["content"].split("---")[1]
        try:
            known = isinstance(yaml.safe_load(head), dict)
        except yaml.YAMLError:
            known = False
        if not known:
            raise _Refused(400, "invalid metadata", errors=[{"message": "not a mapping"}], warnings=[])
        self.answer({"errors": [], "warnings": []})

    def preupload(self, namespace: str, name: str, revision: str) -> None:
        repo = self.repo(namespace, name, write=not self.as_pr)
        files = repo.commits[self.at(repo, revision)]
        answers = []
        for file in self.json()["files"]:
            lfs = bool(_LFS.search(file["path"]))
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if (present := files.get(file["path"])) is not None:
                blob = hashlib.sha1(b"blob %d\0" % len(present) + present).hexdigest()
                answer["oid"] = hashlib.sha256(present).hexdigest() if lfs else blob
            answers.append(answer)
        self.answer({"files": answers})

    def batch(self, namespace: str, name: str) -> None:
        self.repo(namespace, name)
        objects = []
        for item in self.json()["objects"]:
            href = f"{self.server.endpoint}/lfs/{item['oid']}"
            new = item["oid"] not in self.server.objects
            objects.append({**item, **({"actions": {"upload": {"href": href}}} if new else {})})
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.answer()

    def commit(self, namespace: str, name: str, revision: str) -> None:
        repo = self.repo(namespace, name, write=not self.as_pr)
        head = self.at(repo, revision)
        entries = [json.loads(line) for line in self.body.splitlines()]
        header = entries[0]["value"]
        if header.get("parentCommit") not in (None, head):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for entry in entries[1:]:
            kind, value = entry["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        ref = f"refs/pr/{number}" if self.as_pr else f"refs/heads/{revision}"
        oid = repo.commit(ref, files, header["summary"])
        url = f"{self.server.endpoint}/{namespace}/{name}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        self.answer({**answer, **({"pullRequestUrl": f"{url}/discussions/{number}"} if self.as_pr else {})})

    def refs(self, namespace: str, name: str) -> None:
        repo = self.repo(namespace, name)
        kinds: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "pr": []}
        for ref, oid in repo.refs.items():
            _, kind, short = ref.split("/", 2)
            kinds[kind].append({"name": short, "ref": ref, "targetCommit": oid})
        self.answer({"branches": kinds["heads"], "tags": kinds["tags"], "converts": [], "pullRequests": kinds["pr"]})

    def branch(self, namespace: str, name: str, branch: str) -> None:
        repo, ref = self.repo(namespace, name, write=True), f"refs/heads/{branch}"
        if self.command == "DELETE":
            del repo.refs[ref]
        elif ref in repo.refs:
            raise _Refused(409, "Reference already exists")
        else:
            repo.refs[ref] = self.at(repo, self.json().get("startingPoint", "main"))
        self.answer()

    def tag(self, namespace: str, name: str, revision: str) -> None:
        repo = self.repo(namespace, name, write=True)
        if self.command == "DELETE":
            del repo.refs[f"refs/tags/{revision}"]
            return self.answer()
        ref = f"refs/tags/{self.json()['tag']}"
        if ref in repo.refs:
            raise _Refused(409, "Tag reference exists already")
        repo.refs[ref] = self.at(repo, revision)
        self.answer()

    def info(self, namespace: str, name: str, revision: str = "main") -> None:
        repo = self.repo(namespace, name)
        oid = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        facts = {"id": f"{namespace}/{name}", "modelId": f"{namespace}/{name}", "sha": oid, "private": repo.private}
        pipeline = {"pipeline_tag": "image-classification", "library_name": "timm"}
        self.answer({**facts, **pipeline, "gated": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, namespace: str, name: str, revision: str) -> None:
        repo = self.repo(namespace, name)
        files = repo.commits[self.at(repo, revision)]
        entries = []
        for path, data in files.items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self.answer(entries)

    def resolve(self, namespace: str, name: str, rest: str) -> None:
        repo = self.repo(namespace, name)
        for cut in [k for k, letter in enumerate(rest) if letter == "/"]:
            if oid := repo.find(rest[:cut]):
                break
        else:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        data = repo.commits[oid].get(rest[cut + 1 :])
        if data is None:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(data, X_Repo_Commit=oid, ETag=etag)


_NAME, _REV = r"([^/]+)/([^/]+)", r"([^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REV}", "preupload"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(\w+)", "put"),
    ("POST", rf"/api/models/{_NAME}/commit/{_REV}", "commit"),
    ("GET", rf"/api/models/{_NAME}/refs", "refs"),
    ("POST DELETE", rf"/api/models/{_NAME}/branch/{_REV}", "branch"),
    ("POST DELETE", rf"/api/models/{_NAME}/tag/{_REV}", "tag"),
    ("GET", rf"/api/models/{_NAME}", "info"),
    ("GET", rf"/api/models/{_NAME}/revision/{_REV}", "info"),
    ("GET", rf"/api/models/{_NAME}/tree/{_REV}", "tree"),
    ("GET HEAD", rf"/{_NAME}/resolve/(.+)", "resolve"),
]
