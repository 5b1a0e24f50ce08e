"""A small hub on this machine: enough of the real one's addresses for a model and a data set to be loaded from it."""

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
    """Folders served as repositories, each at one commit. `asked` holds the paths of all requests."""

    def __init__(self) -> None:
        self.folders: dict[tuple[str, str], tuple[Path, str]] = {}
        self.asked: list[str] = []
        self.address = ""

    def add(self, kind: str, name: str, folder: Path) -> str:
        """Serve a folder as a repository of kind `models` or `datasets`; returns its commit."""
        listing = "".join(f"{path.relative_to(folder)} {_hash(path)}\n" for path in _files(folder))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.folders[kind, name] = folder, commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request."""
        path = path.split("?")[0]
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            folder, commit = self.folders.get(("datasets" if match[1] else "models", match[2]), (None, ""))
            if folder is None or not (folder / match[3]).is_file():
                missing = "EntryNotFound" if folder else "RepoNotFound"
                return 404, {"X-Error-Code": missing, "X-Repo-Commit": commit}, b""
            body = (folder / match[3]).read_bytes()
            return (
                200,
                {"ETag": f'"{_hash(folder / match[3])}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"},
                body,
            )
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            folder, commit = self.folders.get((match[1], match[2]), (None, ""))
            if folder is None:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
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
            self.rfile.read(length)
            served.asked.append(f"{self.command} {self.path}")
            status, headers, body = served.answer(self.path)
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
