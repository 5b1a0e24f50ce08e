"""A small hub on this machine: enough of the real one's addresses for models, data sets and SAEs to be loaded from it and pushed to it."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Hub:
    """Folders served as repositories, each at one commit. `asked` holds the paths of all requests, `gated` names of models that give
    no files; what is pushed is written into `pushed`."""

    def __init__(self) -> None:
        self.folders: dict[tuple[str, str], tuple[Path, str]] = {}
        self.asked: list[str] = []
        self.gated: set[str] = set()
        self.pushed: Path | None = None
        self.address = ""

    def add(self, kind: str, name: str, folder: Path) -> str:
        """Serve a folder as a repository of kind `models` or `datasets`; returns its commit."""
        listing = "".join(f"{path.relative_to(folder)} {_hash(path)}\n" for path in _files(folder))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.folders[kind, name] = folder, commit
        return commit

    def answer(self, path: str, sent: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request that sent something."""
        path = path.split("?")[0]
        if path == "/api/repos/create" and self.pushed:
            told = json.loads(sent)
            name = "/".join(filter(None, (told.get("organization"), told["name"])))
            return 200, {}, json.dumps({"url": f"{self.address}/{name}"}).encode()
        if path == "/api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)) and self.pushed:
            return 200, {}, json.dumps(self._take(self.pushed / match[1], match[1], match[2], sent)).encode()
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            folder, commit = self.folders.get(("datasets" if match[1] else "models", match[2]), (None, ""))
            if match[2] in self.gated:
                return 403, {"X-Error-Code": "GatedRepo"}, b""
            if folder is None or not (folder / match[3]).is_file():
                missing = "EntryNotFound" if folder else "RepoNotFound"
                return 404, {"X-Error-Code": missing, "X-Repo-Commit": commit}, b""
            body = (folder / match[3]).read_bytes()
            return (
                200,
                {"ETag": f'"{_hash(folder / match[3])}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"},
                body,
            )
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            folder, commit = self.folders.get((match[1], match[2]), (None, ""))
            if folder is None:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            if match[3] not in (None, "main", commit):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in _files(folder)]
            return 200, {}, json.dumps({"id": match[2], "sha": commit, "siblings": siblings, "tags": []}).encode()
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(tree|paths-info)/[^/]+/?(.*)", path):
            folder, commit = self.folders.get((match[1], match[2]), (None, ""))
            if folder is None or match[4]:
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            entries = [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": _hash(file)}
                for file in _files(folder)
            ]
            return 200, {}, json.dumps(entries).encode()
        return 404, {}, b"{}"

    def _take(self, folder: Path, name: str, step: str, sent: bytes) -> dict[str, Any]:
        """What a client is told that asks how to send files, or sends them."""
        if step == "preupload":
            files = [file["path"] for file in json.loads(sent)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                path = folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = self.add("models", name, folder)
        return {"commitUrl": f"{self.address}/{name}/commit/{commit}", "commitOid": commit}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers within the block."""
    served = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(length)
            served.asked.append(f"{self.command} {self.path}")
            status, headers, body = served.answer(self.path, sent)
            if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
                end = min(int(wanted[2] or len(body) - 1), len(body) - 1)
                headers |= {"Content-Range": f"bytes {wanted[1]}-{end}/{len(body)}"}
                status, body = 206, body[int(wanted[1]) : end + 1]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = respond

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    served.address = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
