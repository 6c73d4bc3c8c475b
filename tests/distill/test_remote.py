"""A teacher behind a URL: our own server, one that fails, and a file that goes on."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from retort.distill import remote
from retort.distill.data import load_rows
from retort.distill.remote import RemoteTeacher, complete, write_texts
from retort.errors import ConfigurationError, RetortError
from tests.serve import tiny

PROMPTS = [f"hello {i}" for i in range(11)]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Pauses are noted, not slept."""
    waited = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    return waited


class Server:
    """Answers with the statuses in ``script``, then 200; the text is the prompt reversed."""

    def __init__(self):
        self.script, self.asked = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers.get("Authorization"), body))
                status = outer.script.pop(0) if outer.script else 200
                self.send_response(status)
                self.send_header("Retry-After", "3")
                self.end_headers()
                text = str(body.get("prompt", ""))[::-1]
                self.wfile.write(json.dumps({"choices": [{"text": text}]}).encode())

            def log_message(self, *_):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def teacher(server, **changes):
    return RemoteTeacher(server.url, "m", **{"workers": 1, "retries": 2, **changes})


def test_our_own_server_gives_the_engines_text_as_rows_to_train_on(tmp_path, tmp_path_factory):
    folder = tiny.save(tmp_path_factory.mktemp("remote") / "tiny")
    with tiny.in_process(folder) as served:
        asked = RemoteTeacher(f"{served.url}/v1", tiny.NAME, max_tokens=6, workers=2)
        path = write_texts(asked, PROMPTS[:3], tmp_path / "t.jsonl")
        chat = complete(asked, [{"role": "user", "content": "hello"}])
    with tiny.load_engine(folder, drafter=None) as engine:
        wanted = [out.text for out in engine.generate(PROMPTS[:3], max_new_tokens=6)]
    rows = load_rows(str(path))
    assert [r["completion"] for r in rows] == wanted and rows["prompt"] == PROMPTS[:3]
    assert isinstance(chat, str)


def test_a_busy_server_is_asked_again_when_it_says(server, no_waiting):
    server.script = [503, 429]
    assert complete(teacher(server, api_key="k"), "abc") == "cba"
    assert no_waiting == [3.0, 3.0] and server.asked[0][1] == "Bearer k"


def test_a_refusal_is_not_repeated(server):
    server.script = [400]
    with pytest.raises(ConfigurationError, match="400"):
        complete(teacher(server), "abc")
    assert len(server.asked) == 1


def test_a_lost_server_keeps_what_was_written_and_the_file_goes_on(server, tmp_path):
    path, asked = tmp_path / "t.jsonl", teacher(server)
    server.script = [200] * 6 + [500] * 3
    with pytest.raises(RetortError, match="did not answer 3 times"):
        write_texts(asked, PROMPTS, path)
    kept = path.read_text()
    assert len(kept.splitlines()) == 4  # a whole batch of four
    path.write_text(kept + '{"half')
    server.asked.clear()
    write_texts(asked, PROMPTS, path)
    assert [body["prompt"] for _, _, body in server.asked] == PROMPTS[4:]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["completion"] for r in rows] == [p[::-1] for p in PROMPTS]


def test_a_file_of_other_prompts_or_another_teacher_is_refused(server, tmp_path):
    path = write_texts(teacher(server), PROMPTS, tmp_path / "t.jsonl")
    for asked, prompts in (teacher(server), ["x"]), (teacher(server, max_tokens=2), PROMPTS):
        with pytest.raises(ConfigurationError, match="row 1"):
            write_texts(asked, prompts, path)
    (tmp_path / "notes").write_text("mine\n")
    with pytest.raises(ConfigurationError, match="no text of a teacher"):
        write_texts(teacher(server), PROMPTS, tmp_path / "notes")


def test_a_text_with_a_line_separator_goes_on(server, tmp_path):
    prompts = ["a\u2028b", "c\u0085d"]
    path = write_texts(teacher(server), prompts[:1], tmp_path / "t.jsonl")
    write_texts(teacher(server), prompts, path)
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
    assert [r["completion"] for r in rows] == ["b\u2028a", "d\u0085c"]


@pytest.mark.parametrize("content", [b"my notes", b"\xff\nhalf", b'{"a": 1}\nhalf'])
def test_a_file_of_something_else_is_not_cut(server, tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError):
        write_texts(teacher(server), PROMPTS, path)
    assert path.read_bytes() == content


def test_an_empty_answer_gives_no_row_and_other_addresses_are_refused(server, tmp_path):
    path = write_texts(teacher(server), ["a", " ", "b"], tmp_path / "t.jsonl")
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 2]
    with pytest.raises(ConfigurationError, match="http"):
        RemoteTeacher("file:///etc/passwd", "m")
