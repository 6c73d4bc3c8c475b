"""FAULTS.md S15 and S16: odd HTTP, and who is let in."""

import base64
import http.client
import json
import socket
import time

import pytest

from retort.serve import server
from tests.serve import tiny
from tests.serve.test_bad_input import refused

KEY = "correct horse"
BODY = json.dumps({"prompt": "the cat", "max_tokens": 2}).encode()


def talk(port: int, data: bytes, half_close: bool = False) -> bytes:
    """Everything that the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


def head(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode()


def test_s15_a_huge_header_is_refused(served):
    refused(served.http.get("/health", headers={"x-big": "x" * 40_000}), [431])
    endless = b"GET /health HTTP/1.1\r\nx: " + b"x" * 300_000
    answer = talk(served.port, endless)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert served.http.get("/health").status_code == 200


def test_s15_300_headers_are_refused(served):
    refused(served.http.get("/health", headers={f"x-{i}": "1" for i in range(300)}), [431])


def test_s15_a_64_mb_body_is_refused(served):
    start = time.process_time()
    lines = ("POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json")
    answer = talk(served.port, head(*lines, "content-length: 67108864", "connection: close"))
    assert answer.startswith(b"HTTP/1.1 413") and time.process_time() - start < 5
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    answer = talk(served.port, head(*lines, "transfer-encoding: chunked") + chunk * 6)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")


def test_s15_a_slow_body_and_a_slow_head_end(folder, monkeypatch):
    from retort.serve import bodies

    monkeypatch.setattr(bodies.read_body, "__defaults__", (bodies.MAX_BODY, 0.3))
    monkeypatch.setattr(server, "_HEADER_SECONDS", 0.3)
    with tiny.in_process(folder) as served:
        lines = ("POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json")
        slow = head(*lines, "content-length: 50", "connection: close") + b'{"prompt"'
        assert talk(served.port, slow).startswith(b"HTTP/1.1 408")
        assert talk(served.port, b"GET /health HT") == b""
        assert talk(served.port, b"") == b""
        assert served.complete(prompt="the cat", max_tokens=2)


def test_s15_a_body_that_no_route_reads_must_end_too(folder, monkeypatch):
    """One byte at a time would otherwise keep a connection for ever."""
    monkeypatch.setattr(server, "_BODY_SECONDS", 0.5)
    lines = ("GET /health HTTP/1.1", "host: x", "content-length: 1000000")
    with (
        tiny.in_process(folder) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection,
    ):
        connection.sendall(head(*lines))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")

        def cut():
            try:
                connection.sendall(b"x")
            except OSError:
                return True
            time.sleep(0.05)
            return False

        tiny.eventually(cut)


@pytest.mark.parametrize(
    ("status", "path", "more"),
    [
        (404, "/nowhere", {}),
        (405, "/health", {}),
        (413, "/v1/completions", {}),
        (431, "/v1/completions", {f"x-{i}": "1" for i in range(300)}),
        (401, "/v1/completions", {"authorization": "Bearer wrong"}),
    ],
)
def test_s15_a_client_that_writes_first_sees_why_it_was_refused(
    served, guarded, status, path, more
):
    """Closing on unread input resets the connection, and the answer would be lost."""
    asked = guarded if status == 401 else served
    connection = http.client.HTTPConnection("127.0.0.1", asked.port, timeout=60)
    headers = {"content-type": "application/json", "connection": "close", **more}
    connection.request("POST", path, b" " * (32 * 2**20), headers)
    answer = connection.getresponse()
    assert answer.status == status and json.loads(answer.read())["error"]["message"]
    connection.close()


def test_an_offer_of_another_protocol_is_passed_over(served):
    """As Java's client and ``curl --http2`` make it with every request."""
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAA"}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    for _ in range(2):
        headers = {"content-type": "application/json", **offer}
        connection.request("POST", "/v1/completions", BODY, headers)
        answer = connection.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["object"] == "text_completion"
    connection.close()


def test_a_connection_lives_on_after_errors(served):
    """Clients keep connections: what one request did wrong is not the next one's loss."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.connect()
    ours = connection.sock.getsockname()
    wrong = [b"{", b'{"prompt": "x", "temperature": 9}', b'{"prompt": "x", "model": "y"}', b"[]"]
    for path in ("/v1/completions", "/nowhere", "/health"):
        for body in (*wrong, BODY):
            connection.request("POST", path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            good = body == BODY and path == "/v1/completions"
            assert (answer.status == 200) == good
            answer.read()
            assert connection.sock.getsockname() == ours
    connection.close()


def test_s15_half_closed_sockets(served):
    whole = head("GET /health HTTP/1.1", "host: x", "connection: close")
    assert talk(served.port, whole, half_close=True).startswith(b"HTTP/1.1 200")
    part = head("POST /v1/completions HTTP/1.1", "content-type: application/json")
    talk(served.port, part + BODY[:9], half_close=True)
    assert served.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01", b"hello\r\n\r\n", b"GET / HTTP/9\r\n\r\n"]
)
def test_s15_what_is_not_http(served, data):
    answer = talk(served.port, data)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_request_ids(served):
    assert served.http.get("/health", headers={"x-request-id": "abc-1"}).headers[
        "x-request-id"
    ] == ("abc-1")
    first, second = (served.http.get("/nope").headers["x-request-id"] for _ in range(2))
    assert first != second
    odd = served.http.get("/health", headers={"x-request-id": "<script>"})
    assert "<" not in odd.headers["x-request-id"]


@pytest.fixture(scope="module")
def guarded(folder):
    with tiny.in_process(folder, api_keys=[KEY, "another"]) as served:
        yield served


PATHS = ["/", "/v1/models", "/metrics", "/version", "/openapi.json", "/nothing", "//v1/models"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer correct",
        f"Bearer {KEY}x",
        f"Token {KEY}",
        KEY,
        "Basic ??",
    ],
)
def test_s16_without_the_key_nothing_is_answered(guarded, path, header):
    answer = guarded.http.get(path, headers={"authorization": header} if header else {})
    refused(answer, [401])
    assert "www-authenticate" in answer.headers


def test_s16_posts_and_options_are_guarded(guarded):
    headers = {"content-type": "application/json"}
    before = guarded.engine.target.forward_tokens
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/load_model"):
        refused(guarded.http.post(path, content=BODY, headers=headers), [401])
    refused(guarded.http.request("OPTIONS", "/v1/completions"), [401])
    assert guarded.engine.target.forward_tokens == before


def test_s16_health_is_open(guarded):
    assert guarded.http.get("/health").status_code == 200
    refused(guarded.http.get("//health"), [401])
    refused(guarded.http.get("/health/"), [401])


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("key", [KEY, "another"])
def test_s16_the_key_lets_in(guarded, scheme, key):
    headers = {"authorization": f"{scheme} {key}", "host": "odd.example"}
    assert guarded.http.get("/v1/models", headers=headers).status_code == 200


def test_s16_a_browser_opens_the_playground_with_the_key_as_password(guarded):
    token = base64.b64encode(f"me:{KEY}".encode()).decode()
    answer = guarded.http.get("/", headers={"authorization": f"Basic {token}"})
    assert answer.status_code == 200 and "Retort playground" in answer.text
    wanted = guarded.http.get("/").headers["www-authenticate"]
    assert wanted.startswith("Basic")


def test_s16_keys_are_compared_in_constant_time(guarded, monkeypatch):
    from retort.serve import middleware

    compared = []
    compare = middleware.hmac.compare_digest
    monkeypatch.setattr(
        middleware.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b)
    )
    guarded.http.get("/v1/models", headers={"authorization": "Bearer x"})
    assert len(compared) == 2 and all(len(a) == len(b) == 32 for a, b in compared)


def test_options_without_a_key_is_not_a_cors_grant(served):
    answer = served.http.request("OPTIONS", "/v1/completions", headers={"origin": "http://x"})
    refused(answer, [405])
    assert "access-control-allow-origin" not in answer.headers
