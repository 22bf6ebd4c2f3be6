"""A hub of one process: the part of the Hugging Face Hub's HTTP interface that pushing and fetching a model use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "c0ffee" + 34 * "0"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each the bytes of its files; ``requests`` are what was asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    """What the hub answers."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self) -> bool:
        """Whether the hub lets nobody in, or the repository is not there."""
        self.server.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses or self.headers.get("Authorization") == "Bearer wrong":
            self.answer({"error": "Invalid credentials"}, 401)
            return True
        return False

    def do_POST(self) -> None:
        if self.refused():
            return
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(self.body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.server.repositories:
                self.answer(
                    {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"}, 409
                )
                return
            self.server.repositories[name] = {}
            self.server.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.answer({"url": f"{self.server.address}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = json.loads(self.body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif parts[4] == "commit":
            held = self.server.repositories["/".join(parts[2:4])]
            for line in map(json.loads, self.body.splitlines()):
                if line["key"] == "file":
                    held[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "commitOid": COMMIT,
                    "commitUrl": f"{self.server.address}/{parts[2]}/{parts[3]}/commit/{COMMIT}",
                    "success": True,
                }
            )
        else:
            self.answer({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        if self.refused():
            return
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        held = self.server.repositories.get(name)
        if held is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif parts[0] == "api":
            siblings = [
                {"rfilename": file, "path": file, "type": "file", "size": len(held[file]), "oid": "0"} for file in held
            ]
            tree = len(parts) > 4 and parts[4] == "tree"
            self.answer(
                siblings if tree else {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            )
        elif (file := "/".join(parts[4:])) in held:
            self.answer(held[file], ETag=f'"{hashlib.sha256(held[file]).hexdigest()}"')
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers meanwhile."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
