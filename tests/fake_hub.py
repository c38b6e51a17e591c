"""A hub of our own on 127.0.0.1 that answers the calls the real client makes when it uploads, and keeps what it got.

with fake_hub.Hub(fail={"/commit/": 2}) as hub: ... hub.files, hub.received

It also hands out one data set, `someone/pictures`, as a whole or in parts: hub.table = {path: bytes}; hub.ranges. And
the files of models: hub.models = {"someone/name": {path: bytes}}.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER = "someone"
COMMIT = "c" * 40


class Hub:
    """`fail`: part of an address -> how many times it answers `status` first. `role`: what the token may do."""

    def __init__(self, role="write", fail=None, status=503, accept=True):
        self.role, self.fail, self.status, self.accept = role, dict(fail or {}), status, accept
        self.calls = []  # "METHOD /address"
        self.received = []  # every body, for searching
        self.tokens = set()  # what stood in the Authorization headers
        self.repos = {}  # name -> what was asked: private or public
        self.files = {}  # path in the repository -> bytes, as committed
        self.objects = {}  # sha256 -> bytes, uploaded but not committed
        self.table = {}  # path -> bytes of the data set
        self.models = {}  # name -> {path: bytes}
        self.ranges = []  # (path, first byte, last byte) of each answer that was a part of a file

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, told):
        data = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_call(self):
        hub, body = self.owner, self.body()
        hub.calls.append(f"{self.command} {self.path}")
        hub.received.append(body)
        if authorization := self.headers.get("Authorization"):
            hub.tokens.add(authorization.removeprefix("Bearer "))
        for part, left in hub.fail.items():
            if part in self.path and left:
                hub.fail[part] -= 1
                return self.answer(hub.status, {"error": "the hub is having a bad day"})
        if not hub.accept:
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/whoami-v2":
            token = {"role": hub.role, "displayName": "test"}
            return self.answer(200, {"name": OWNER, "type": "user", "orgs": [], "auth": {"accessToken": token}})
        if hub.role == "read" and self.command != "GET" and self.path != "/api/validate-yaml":
            return self.answer(403, {"error": "you need a token with the role write"})
        if f"/datasets/{OWNER}/pictures" in self.path:
            return self.data_set(unquote(urlsplit(self.path).path).split(f"/datasets/{OWNER}/pictures")[1], body)
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            known = name in hub.repos
            hub.repos.setdefault(name, asked.get("visibility") or asked.get("private"))
            return self.answer(409 if known else 200, {"url": f"{hub.url}/{name}", "name": name})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", self.path):
            large = (".safetensors", ".png")
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            objects = [{**o, "actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}} for o in wanted]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if self.path.startswith("/put/"):
            hub.objects[self.path.removeprefix("/put/")] = body
            return self.answer(200, {})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            name = "/".join(self.path.split("/")[3:5])
            oid = "0" * 40
            return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})
        if match := re.match(r"/(?:api/models/)?([^/]+/[^/]+)(?:/resolve/[^/]+/(.+)|$|/revision/)", self.path):
            name, path = match[1], match[2] and unquote(urlsplit(match[2]).path)
            if name in hub.models:
                table = hub.models[name]
                siblings = [{"rfilename": one} for one in table]
                if path is None:
                    return self.answer(200, {"id": name, "sha": COMMIT, "private": False, "siblings": siblings})
                return self.file(path, table[path]) if path in table else self.missing()
        return self.answer(404, {"error": f"no such address: {self.path}"})

    def data_set(self, path, body):
        table = self.owner.table
        entries = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in table.items()]
        if path in ("", "/revision/main", f"/revision/{COMMIT}"):
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            told = {"id": f"{OWNER}/pictures", "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}
            return self.answer(200, told)
        what, _, name = [*path.removeprefix("/").split("/", 2), ""][:3]  # in between stands the commit
        if what == "tree":
            depth = len(name.split("/")) if name else 0
            inside = [entry for entry in entries if entry["path"].startswith(f"{name}/" if name else "")]
            folders = {"/".join(entry["path"].split("/")[: depth + 1]) for entry in inside} - table.keys()
            found = [entry for entry in inside if entry["path"].count("/") == depth]
            found += [{"type": "directory", "path": one, "oid": "0"} for one in sorted(folders)]
            return self.answer(200, found) if found else self.missing()
        if what == "paths-info":
            wanted = json.loads(body)["paths"]
            return self.answer(200, [entry for entry in entries if entry["path"] in wanted])
        return self.file(name, table[name]) if name in table else self.missing()

    def missing(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def file(self, name, data):
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first = int(part[1]) if part else 0
        last = min(int(part[2] or len(data)), len(data) - 1) if part else len(data) - 1
        self.send_response(206 if part else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if part:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.owner.ranges += [(name, first, last)] if part else []
            self.wfile.write(data[first : last + 1])

    do_GET = do_POST = do_PUT = do_HEAD = handle_call
