"""What is at ``/``: the page for browsers, and what the server is for others."""

import re

import pytest

from tests.serve.local_server import LocalServer

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def test_a_browser_gets_the_page_and_others_what_the_server_is(server: LocalServer) -> None:
    page = server.client.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text.startswith("<!doctype html>")
    told = server.client.get("/")
    assert told.json()["name"] == "Pyramid Serve"
    assert page.headers["vary"] == told.headers["vary"] == "Accept"


def test_the_page_may_run_its_own_scripts_only(server: LocalServer) -> None:
    page = server.client.get("/", headers=BROWSER)
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|https?://", page.text)


def test_each_file_that_the_page_names_is_there(server: LocalServer) -> None:
    waiting = re.findall(r'(?:src|href)="(page/[^"]+)"', server.client.get("/", headers=BROWSER).text)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        answer = server.client.get(f"/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["cache-control"] == "no-cache"
        if name.endswith(".js"):
            assert answer.headers["content-type"].startswith("text/javascript")
            waiting += [f"page/{module}" for module in re.findall(r'from "\./([^"]+)"', answer.text)]
    assert len(seen) > 10


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/__init__.py", "/page/nothing.js", "/page/"])
def test_nothing_beside_the_files_is_served(server: LocalServer, path: str) -> None:
    assert server.client.get(path).status_code == 404
