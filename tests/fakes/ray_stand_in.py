"""Stands in for Ray's `ray start --block` in tests of its supervisors: what they need of it, and faults on demand.

A head has an HTTP API and takes in workers at its GCS port; each has a `raylet`, a process in a session of its own, and
ends when that does. RAY_STAND_IN, JSON by the address of a node, says what goes wrong there. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RAYLET = "import time; time.sleep(600)"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["start"])
    for flag in ("--block", "--disable-usage-stats", "--head"):
        parser.add_argument(flag, action="store_true")
    for name in ("--port", "--dashboard-port", "--num-gpus", "--num-cpus"):
        parser.add_argument(name, type=int)
    for name in ("--node-ip-address", "--address", "--temp-dir"):
        parser.add_argument(name)
    asked, _ = parser.parse_known_args()
    wrong = json.loads(os.environ.get("RAY_STAND_IN", "{}")).get(asked.node_ip_address, {})
    print(f"Local node IP: {asked.node_ip_address}", flush=True)
    if "says" in wrong:
        print(wrong["says"], flush=True)
        return 1
    token_file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600 and "RAY_ADDRESS" not in os.environ
    gpus = wrong.get("gpus", asked.num_gpus)
    raylet = subprocess.Popen([sys.executable, "-c", RAYLET], start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: (raylet.kill(), sys.exit(1)))
    if wrong.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    slow = wrong.get("slow") and not Path("slow").exists()  # the first time
    if asked.head:
        Head(asked, token_file.read_text(), None if slow else gpus, wrong).serve()
    elif not wrong.get("never") and not slow:
        host, _, port = asked.address.rpartition(":")
        join = {"node_ip": asked.node_ip_address, "GPU": gpus, "token": token_file.read_text()}
        gcs = socket.create_connection((host, int(port)))
        gcs.sendall(json.dumps(join).encode() + b"\n")
    if slow:
        Path("slow").touch()
        time.sleep(1)
        print("Exception: The current node timed out during startup. This could happen because some", flush=True)
        return 1
    raylet.wait()
    print("Some Ray subprocesses exited unexpectedly:\n  raylet [exit code=-9]", flush=True)
    return 1


class Head:
    """The API of a head."""

    def __init__(self, asked: argparse.Namespace, token: str, gpus: int | None, wrong: dict) -> None:
        self.asked, self.token, self.wrong = asked, token, wrong
        self.nodes = {} if gpus is None else {asked.node_ip_address: gpus}
        self.jobs: dict[str, subprocess.Popen[bytes]] = {}
        self.entrypoints: dict[str, str] = {}
        self.logs = Path(asked.temp_dir, "session_1", "logs")
        self.logs.mkdir(parents=True, exist_ok=True)
        Path(asked.temp_dir, "session_latest").unlink(missing_ok=True)
        Path(asked.temp_dir, "session_latest").symlink_to("session_1")
        (self.logs / "gcs_server.out").write_text("the GCS's own log\n")

    def serve(self) -> None:
        gcs = socket.create_server(("", self.asked.port))
        threading.Thread(target=self._take_in, args=(gcs,), daemon=True).start()
        time.sleep(self.wrong.get("slow_s", 0))
        head = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                head.answer(self, None)

            def do_POST(self) -> None:
                head.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        api = ThreadingHTTPServer((self.asked.node_ip_address, self.asked.dashboard_port), Handler)
        threading.Thread(target=api.serve_forever, daemon=True).start()

    def _take_in(self, gcs: socket.socket) -> None:
        held = []
        while True:
            connection, _ = gcs.accept()
            held.append(connection)
            join = json.loads(connection.makefile().readline() or "{}")  # empty: who only looks whether it answers
            if join.get("token") == self.token:
                self.nodes[join["node_ip"]] = join["GPU"]

    def answer(self, request: BaseHTTPRequestHandler, body: dict | None) -> None:
        given = request.headers.get("Authorization")
        status, value = 200, self._answer(request.path.partition("?")[0], body)
        if given != f"Bearer {self.token}" or self.wrong.get("refuses"):
            status, value = 403 if given else 401, {}
        data = json.dumps(value).encode()
        request.send_response(status)
        request.end_headers()
        request.wfile.write(data)

    def _answer(self, path: str, body: dict | None) -> dict:
        if path == "/api/version":
            return {"ray_version": "2.60.0"}
        if path == "/api/v0/nodes":
            found = [
                {"node_ip": ip, "state": "ALIVE", "resources_total": {"GPU": float(gpus), "CPU": 1.0}}
                for ip, gpus in self.nodes.items()
            ]
            return {"data": {"result": {"result": found}}}
        if body is not None:
            job = body["submission_id"]
            env = {**os.environ, "RAY_ADDRESS": f"{self.asked.node_ip_address}:{self.asked.port}"}
            with open(self.logs / f"job-driver-{job}.log", "wb") as log:
                log.write(b"Running entrypoint\n")
                log.flush()
                self.jobs[job] = subprocess.Popen(
                    body["entrypoint"], shell=True, env=env, stdout=log, stderr=log, start_new_session=True
                )
            return {"submission_id": job}
        job = self.jobs[path.rpartition("/")[2]]
        code = job.poll()
        state = "RUNNING" if code is None else "SUCCEEDED" if code == 0 else "FAILED"
        return {"status": state, "driver_exit_code": code, "message": f"Job entrypoint command failed: {code}"}


if __name__ == "__main__":
    sys.exit(main())
