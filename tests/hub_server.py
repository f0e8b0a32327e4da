"""The routes of the Hugging Face hub that a push needs, on a local port and really served."""

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import yaml


class HubServer:
    """A hub in memory: users by token, repositories with files, and a log of what was asked."""

    def __init__(
        self,
        users: Mapping[str, dict],  # token -> {"name", "role": write or read, "orgs": [...]}
        fail: Mapping[str, int] | None = None,  # part of "PUT /lfs/..." -> the status answered
    ):
        self.users, self.fail = dict(users), dict(fail or {})
        self.repos: dict[str, dict] = {}  # name -> {"private", "files": {path: bytes}, "commits"}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.asked: list[str] = []  # "POST /api/repos/create"
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def may_write(self, user: dict, repo: str) -> bool:
        """Whether a user's token may write in the namespace of a repository."""
        return user["role"] == "write" and repo.split("/")[0] in [user["name"], *user["orgs"]]

    def commit(self, repo: str, lines: list[dict]) -> str:
        """Apply a commit as a whole, or raise `KeyError` for a large file that never came."""
        files = dict(self.repos[repo]["files"])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        self.repos[repo]["files"] = files
        self.repos[repo]["commits"].append(lines[0]["value"]["summary"])
        return hashlib.sha1(repr(sorted(files)).encode()).hexdigest()


class _Refused(Exception):
    """An answer other than 200: status, error code, message, and the repository if it is there."""


def held(path: str, data: bytes) -> dict:
    """How the hub describes a file: weights by SHA-256, others as git does."""
    about = {"rfilename": path, "size": len(data),
             "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}  # fmt: skip
    if path.endswith(".safetensors"):
        digest = hashlib.sha256(data).hexdigest()
        about["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 100}
    return about


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body, path = self.rfile.read(length), self.path.split("?")[0]
            hub.asked.append(f"{self.command} {path}")
            headers = {}
            try:
                for part, status in hub.fail.items():
                    if part in f"{self.command} {path}":
                        raise _Refused(status, "", "made to fail")
                status, value = 200, self.route(path, body)
            except _Refused as e:
                status, code, message, *repo = e.args
                value = {"error": message, "url": "/".join([hub.endpoint, *repo])}
                headers = {"X-Error-Code": code, "X-Error-Message": message}
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**headers, "Content-Type": "application/json"}.items():
                if text:
                    self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def user(self) -> dict:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token not in hub.users:
                raise _Refused(401, "", "Invalid credentials in Authorization header")
            return hub.users[token]

        def route(self, path: str, body: bytes) -> dict:
            if path.startswith("/lfs/"):  # a signed address: needs no token
                if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                    raise _Refused(400, "", "the bytes are not those of the hash")
                hub.objects[path.removeprefix("/lfs/")] = body
                return {}
            user = self.user()
            if path == "/api/whoami-v2":
                orgs = [{"name": name} for name in user["orgs"]]
                return {"name": user["name"], "type": "user", "orgs": orgs,
                        "auth": {"accessToken": {"role": user["role"]}}}  # fmt: skip
            if path == "/api/repos/create":
                return self.create(user, json.loads(body))
            if path == "/api/validate-yaml":
                return self.validate(json.loads(body)["content"])
            if path.endswith(".git/info/lfs/objects/batch"):
                return self.batch(user, path[1:].split(".git/")[0], json.loads(body))
            _, _, _, space, name, *rest = path.split("/")
            return self.model(user, f"{space}/{name}", rest, body)

        def create(self, user: dict, asked: dict) -> dict:
            repo = f"{asked['organization'] or user['name']}/{asked['name']}"
            if not hub.may_write(user, repo):
                raise _Refused(403, "", "You don't have the rights to create a model there")
            if repo in hub.repos:
                raise _Refused(409, "", "You already created this model repo", repo)
            private = asked.get("visibility") == "private"
            hub.repos[repo] = {"private": private, "files": {}, "commits": []}
            return {"url": f"{hub.endpoint}/{repo}", "id": repo, "name": repo}

        def validate(self, content: str) -> dict:
            front = yaml.safe_load(content.split("---\n")[1])
            if not isinstance(front, dict) or not isinstance(front.get("tags", []), list):
                raise _Refused(400, "", "the metadata is not valid")
            return {"warnings": [], "errors": []}

        def batch(self, user: dict, repo: str, asked: dict) -> dict:
            self.needs_write(user, repo)
            action = {
                o["oid"]: {"href": f"{hub.endpoint}/lfs/{o['oid']}"} for o in asked["objects"]
            }
            return {"objects": [o | {"actions": {"upload": action[o["oid"]]}}
                                for o in asked["objects"]]}  # fmt: skip

        def needs_write(self, user: dict, repo: str) -> None:
            if repo not in hub.repos:
                raise _Refused(404, "RepoNotFound", "Repository not found")
            if not hub.may_write(user, repo):
                raise _Refused(403, "", "Forbidden: you must have write access")

        def model(self, user: dict, repo: str, rest: list[str], body: bytes) -> dict:
            if not rest:
                if repo not in hub.repos:
                    raise _Refused(404, "RepoNotFound", "Repository not found")
                files = [held(*x) for x in hub.repos[repo]["files"].items()]
                return {"id": repo, "private": hub.repos[repo]["private"], "siblings": files}
            self.needs_write(user, repo)
            if rest[0] == "preupload":
                files = json.loads(body)["files"]
                return {"files": [{"path": f["path"], "shouldIgnore": False, "uploadMode":
                        "lfs" if f["path"].endswith(".safetensors") else "regular"}
                        for f in files]}  # fmt: skip
            if rest[0] == "commit":
                oid = hub.commit(repo, [json.loads(line) for line in body.splitlines()])
                return {"commitUrl": f"{hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid}
            return {}

        def log_message(self, *words: object) -> None:
            """Keep the test's output quiet."""

    return Handler
