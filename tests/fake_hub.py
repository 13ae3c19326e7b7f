"""As much of the hub as an upload meets, on 127.0.0.1: repositories, and the bytes of each commit."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """url, created (options of each repository) and commits: [{repo, message, files: {path: bytes}}]."""

    def __init__(self):
        self.created, self.commits, self.tokens = [], [], set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def _answer(self, value, status=200):
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self._answer({"id": "somebody/model", "sha": "0" * 40, "siblings": []})

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers.get("Authorization"))
                if self.path == "/api/repos/create":
                    asked = json.loads(body)
                    hub.created.append(asked)
                    repo = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
                    self._answer({"url": f"{hub.url}/{repo}", "id": repo})
                elif self.path == "/api/validate-yaml":
                    self._answer({"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    files = [
                        {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for each in json.loads(body)["files"]
                    ]
                    self._answer({"files": files})
                elif "/commit/" in self.path:
                    commit = f"{hub.url}/{hub._commit(self.path, body)}/commit/{'1' * 40}"
                    self._answer({"commitUrl": commit, "commitOid": "1" * 40, "success": True})
                else:
                    self._answer({"error": f"no {self.path}"}, 404)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _commit(self, path, body):
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        repo = path.removeprefix("/api/models/").partition("/commit/")[0]
        self.commits.append({"repo": repo, "message": message, "files": files})
        return repo

    def close(self):
        self._server.shutdown()
        self._server.server_close()
