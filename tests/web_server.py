"""A web server on this machine that fails where a test wants it to."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves a folder with byte ranges.

    Attributes:
        failures: path -> what to do with its next requests: a status, ``cut``, or ``whole`` (ranges ignored).
        asked: path -> requests for its bytes so far.
        sent: path -> bytes sent of it.
    """

    daemon_threads = True
    gone = False
    folder: Path
    failures: dict[str, list[int | str]]
    asked: Counter[str]
    sent: Counter[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves early is no error of ours."""


class Handler(SimpleHTTPRequestHandler):
    """Byte ranges, and failures to order."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *words: object) -> None:
        pass

    def translate_path(self, path: str) -> str:
        return str(self.server.folder / path.split("?")[0].strip("/"))

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if self.server.gone:  # a connection that was left open
            self.close_connection = True
            return
        self.server.asked[name] += 1
        orders = self.server.failures.get(name, [])
        order = orders.pop(0) if orders else None
        if isinstance(order, int):
            self.send_error(order)
            return
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            super().do_GET()
            return
        self._send_part(file.read_bytes(), name, order)

    def _send_part(self, data: bytes, name: str, order: str | None) -> None:
        wanted = self.headers.get("Range") if order != "whole" else None
        first, last = 0, len(data) - 1
        if wanted:
            one, _, other = wanted.removeprefix("bytes=").partition("-")
            first, last = int(one), min(int(other or last), last)
        part = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        self.server.sent[name] += len(part)
        if order == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        self.wfile.write(part)


class HubHandler(Handler):
    """A folder as the data set ``someone/photos`` of a Hugging Face hub, as far as reading needs one."""

    def do_GET(self) -> None:
        kind, _, rest = self.path.partition("/datasets/someone/photos")
        if kind == "/api":
            answer = json.dumps(
                self._tree(rest) if rest.startswith("/tree") else {"id": "someone/photos"}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        self.path = rest.removeprefix("/resolve/main")
        super().do_GET()

    def _tree(self, query: str) -> list[dict[str, object]]:
        """Files and folders below one, or directly in it."""
        below, _, options = query.partition("?")
        root = self.server.folder
        folder = root / below.removeprefix("/tree/main").strip("/")
        found = folder.rglob("*") if "recursive=true" in options.lower() else folder.glob("*")
        return [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": path.relative_to(root).as_posix(),
                "size": path.stat().st_size,
                "oid": "0",
            }
            for path in sorted(found)
        ]


@contextmanager
def serving(folder: Path, handler: type[Handler] = Handler) -> Iterator[Server]:
    """A server of a folder, in a thread of its own."""
    with Server(("127.0.0.1", 0), handler) as server:
        server.folder, server.failures = folder, {}
        server.asked, server.sent = Counter(), Counter()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.gone = True
            server.shutdown()
            thread.join()
