"""A hub in a thread: as much of the Hugging Face Hub's interface as `datasets` and `transformers` ask of it."""

import contextlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c0ffee" * 6 + "beef"


def entry(folder: Path, path: Path) -> dict:
    kind = {"type": "directory"} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
    return kind | {"path": path.relative_to(folder).as_posix(), "oid": "0" * 40}


@contextlib.contextmanager
def serving(repositories: dict[str, Path], gated: tuple = ()):
    """Serves folders as data sets (`datasets/owner/name`) or models (`owner/name`) of one commit; gives the address.

    `gated` ones answer that access must be asked for.
    """

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def do_POST(self):
            asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer(body=True, asked=asked)

        def log_message(self, *_):
            pass

        def answer(self, body, asked=b""):
            path = unquote(self.path.split("?")[0]).strip("/")
            api = path.startswith("api/")
            path = path.removeprefix("api/").removeprefix("models/")
            name = next((name for name in repositories if f"{path}/".startswith(f"{name}/")), None)
            if name is None:
                return self.send(401, "RepoNotFound", b"{}", body)
            if name in gated:
                return self.send(403, "GatedRepo", b"{}", body)
            folder, rest = repositories[name], path.removeprefix(name).strip("/").split("/")
            if api:
                return self.api(name, folder, rest, asked, body)
            if rest[0] == "resolve":
                if rest[1] not in ("main", COMMIT):
                    return self.send(404, "RevisionNotFound", b"{}", body)
                file = folder.joinpath(*rest[2:])
                if not file.is_file():
                    return self.send(404, "EntryNotFound", b"{}", body)
                return self.send(200, None, file.read_bytes(), body, ETag=f'"{file.stat().st_size}"')
            return self.send(404, "EntryNotFound", b"{}", body)

        def api(self, name, folder, rest, asked, body):
            entries = [entry(folder, path) for path in sorted(folder.rglob("*"))]
            if rest in ([""], ["revision", "main"], ["revision", COMMIT]):
                siblings = [{"rfilename": one["path"]} for one in entries if one["type"] == "file"]
                found = {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings, "tags": []}
            elif rest[0] == "tree":
                found = [one for one in entries if self.deep() or Path(one["path"]).parent == Path(*rest[2:])]
            elif rest[0] == "paths-info":
                wanted = json.loads(asked)["paths"] if asked.startswith(b"{") else parse_qs(asked.decode())["paths"]
                found = [one for one in entries if one["path"] in wanted]
            else:
                return self.send(404, "RevisionNotFound", b"{}", body)
            return self.send(200, None, json.dumps(found).encode(), body)

        def deep(self):
            return parse_qs(urlparse(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")

        def send(self, status, error, content, body, **headers):
            self.send_response(status)
            if error:
                self.send_header("X-Error-Code", error)
                self.send_header("X-Error-Message", error)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
