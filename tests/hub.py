"""A Hugging Face hub on loopback that has one model, as far as a download asks for it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(name: str, folder: Path, revision: str = "main") -> Iterator[str]:
    """Serves the files of a folder as the model `name` at one revision; yields the address, for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            file, everything = folder / path.rsplit("/", 1)[-1], sorted(folder.iterdir())
            if path in [f"api/models/{name}/revision/{each}" for each in (revision, COMMIT)]:
                siblings = [{"rfilename": each.name} for each in everything]
                body = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            elif path == f"api/models/{name}/tree/{COMMIT}":
                entries = [
                    {"type": "file", "path": each.name, "size": each.stat().st_size, "oid": each.name}
                    for each in everything
                ]
                body = json.dumps(entries).encode()
            elif path.startswith(f"{name}/resolve/{COMMIT}/") and file.is_file():
                body = file.read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
