"""``pyramid-serve up`` in a process of its own, for tests."""

import os
import queue
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from deployments.local.cluster import free_port
from tests.serve.cli.test_command_line import Command

SMALL = {
    "prompt": "a ball",
    "size": "64x64",
    "seconds": "0.4",
    "num_inference_steps": 1,
    "video_num_inference_steps": 1,
}
MAX_QUEUED = 60


class Up:
    """A running ``pyramid-serve up``, and a client for it. Its fields are those that ``send`` needs too."""

    def __init__(self, folder: Path, models: list[dict[str, Any]], *, through_proxy: bool = False) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._config: dict[str, Any] = {
            "applications": [
                {
                    "import_path": "deployments.app:build",
                    "args": {
                        "models": models,
                        "storage": str(folder / "videos"),
                        "claims": {"settings": {"max_queued": MAX_QUEUED, "lease_s": 2.0, "rescan_interval_s": 0.5}},
                        "ingress": {"settings": {"body": {"max_bytes": 1_000_000, "idle_timeout_s": 1.0}}},
                    },
                }
            ],
        }
        self.folder = folder
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self.start(through_proxy=through_proxy)

    def start(self, *, through_proxy: bool = False) -> None:
        """through_proxy: clients go through Serve's proxy, as on a cluster, and not to the ingress itself."""
        options: dict[str, Any] = {"host": "127.0.0.1", "port": self._port}
        if through_proxy:
            options["keep_alive_timeout_s"] = 60
        config = self._config | {"http_options": options}
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config))
        self.command = Command("up", "--config", "config.yaml", cwd=self.folder)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.said = ""
        self.until("Ctrl-C stops it")

    def until(self, text: str) -> str:
        """What it has said, once that has a text in it."""
        while text not in self.said:
            line = self._lines.get(timeout=300)
            assert line, self.said
            self.said += line
        return self.said

    def _read(self) -> None:
        assert self.command.process.stdout is not None
        for line in self.command.process.stdout:
            self._lines.put(line)
        self._lines.put("")  # it has ended

    def stop(self, number: int = signal.SIGINT) -> int:
        os.killpg(self.command.process.pid, number)
        self.command.process.wait(60)
        return self.command.process.returncode

    def submit(self, **fields: Any) -> str:
        answer = self.client.post("/v1/videos", json=SMALL | fields)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def finish(self, video_id: str, *, timeout_s: float = 120.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            answer = self.client.get(f"/v1/videos/{video_id}")
            if answer.status_code == 200 and answer.json()["status"] in ("completed", "failed"):
                video: dict[str, Any] = answer.json()
                return video
            time.sleep(0.2)
        raise AssertionError(f"not within {timeout_s} s: {answer.text}")
