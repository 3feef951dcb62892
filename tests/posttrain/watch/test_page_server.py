"""The page answers this machine alone, to whoever knows the token, and holds no text of others as HTML."""

import http.client
import json
import re
from pathlib import Path

import pytest

from gemma2.core.errors import UsageError
from gemma2.posttrain.watch import page_server
from gemma2.posttrain.watch.page_server import PageServer

NASTY = "<script>alert(1)</script>\x1b[2J"
FILES = Path(page_server.__file__).parent


@pytest.fixture
def server():
    stages = {"rl/seed-1": {"sample": {"completion": NASTY}, "figures": {"kl": float("nan")}}}
    with PageServer(lambda: {"out": NASTY}, stages.get) as made:
        yield made


def ask(server, path=None, method="GET", **headers):
    """(status, headers, body) of a request; `path` is what follows the token."""
    host, port = re.match(r"http://([\d.]+):(\d+)/", server.url).groups()
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    target = f"/{server.token}/{path or ''}"
    connection.putrequest(method, headers.pop("target", target), skip_host=True)
    for name, value in ({"Host": f"{host}:{port}"} | {k.replace("_", "-"): v for k, v in headers.items()}).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_the_page_and_its_files_come_with_a_strict_policy(server):
    for path, kind in (("", "text/html"), ("page.js", "text/javascript"), ("page.css", "text/css")):
        status, headers, body = ask(server, path)
        assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8") and body
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_foreign_text_travels_as_json_and_numbers_that_json_has_not_as_null(server):
    status, headers, body = ask(server, "view.json")
    assert (status, headers["Content-Type"], json.loads(body)) == (200, "application/json", {"out": NASTY})
    assert b"\x1b" not in body
    found = json.loads(ask(server, "stage.json?name=rl%2Fseed-1")[2])
    assert found == {"sample": {"completion": NASTY}, "figures": {"kl": None}}


def test_nothing_on_the_page_makes_html_of_data_or_comes_from_elsewhere():
    script, page = ((FILES / name).read_text(encoding="utf-8") for name in ("page.js", "page.html"))
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert word not in script
    assert re.findall(r"<script(?! src=\"page\.js\" defer>)", page) == []
    assert re.findall(r"\son\w+=|style=", page) == []
    addresses = set(re.findall(r"https?://[^\s\"']+", script + page + (FILES / "page.css").read_text()))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address


@pytest.mark.parametrize("target", ["/", "/page.js", "/view.json", "/wrong/", "/wrong/view.json", "//", "/%00/"])
def test_without_the_token_there_is_nothing(server, target):
    assert ask(server, target=target)[0] == 404


@pytest.mark.parametrize(
    "path", ["nothing", "../view.json", "page.html", "stage.json", "stage.json?name=other", "x" * 5000]
)
def test_an_unknown_path_is_not_found(server, path):
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", "", None, "localhost:x"]
)
def test_another_host_is_refused(server, host):
    assert ask(server, Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1"])
def test_a_tunnel_may_change_the_port(server, host):
    assert ask(server, Host=host)[0] == 200


def test_another_page_cannot_read_it_but_a_link_may_lead_to_it(server):
    assert ask(server, "view.json", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert ask(server, "view.json", Sec_Fetch_Site="same-site", Sec_Fetch_Mode="cors")[0] == 403
    assert ask(server, "", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "BREW"])
def test_only_get_is_answered(server, method):
    assert ask(server, method=method)[0] == 405


def test_it_listens_to_this_machine_only_and_tokens_differ(server):
    assert server._server.server_address[0] == "127.0.0.1"
    with PageServer(dict, lambda name: None) as other:
        assert other.token != server.token and len(other.token) >= 32
        with pytest.raises(UsageError, match=r"--port \d+ cannot be used .*; give another port"):
            PageServer(dict, lambda name: None, other._server.server_port)
