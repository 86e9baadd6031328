from tests.serve.local_server import LocalServer


def test_probes_answer(server: LocalServer) -> None:
    for path in ("/healthz", "/readyz"):
        assert server.client.get(path).json() == {"status": "ok"}
    assert server.client.get("/").json()["docs"] == f"{server.url}/docs"
    assert server.client.get("/docs").status_code == 200
