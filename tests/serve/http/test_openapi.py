"""Requests invented from the OpenAPI document."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.claims.config import ClaimsConfig
from tests.serve.local_server import serve_locally

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "use_after_free",
]
SCHEMATHESIS = shutil.which("schemathesis", path=str(Path(sys.executable).parent))


@pytest.mark.slow
@pytest.mark.skipif(SCHEMATHESIS is None, reason="needs schemathesis: pip install schemathesis")
def test_no_invented_request_finds_a_fault(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path / "storage"), claims=ClaimsConfig(max_queued=20)) as server:
        command = [str(SCHEMATHESIS), "run", f"{server.url}/openapi.json", "--max-examples", "30", "--seed", "1"]
        options = ["--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing,stateful", "--no-color"]
        finished = subprocess.run(
            [*command, *options, "--request-timeout", "20", "--generation-database", "none"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout[-10_000:]
        assert server.client.get("/readyz").status_code == 200
