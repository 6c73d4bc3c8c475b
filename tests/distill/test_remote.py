"""A teacher behind a URL: our own server, one that fails, and a file that goes on."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

from retort.cli import run as command
from retort.distill import remote
from retort.distill.data import load_rows
from retort.distill.remote import RemoteTeacher, complete, write_texts
from retort.distill.remote_rows import API_KEY
from retort.distill.trainer import DistillTrainer
from retort.errors import ConfigurationError, RetortError
from retort.train.arguments import resolved
from tests.distill.toys import ROWS, config, llama, tokenizer
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
        self.script, self.asked, self.models = [], [], ["m"]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(200, {"data": [{"id": name} for name in outer.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers.get("Authorization"), body))
                status = outer.script.pop(0) if outer.script else 200
                text = str(body.get("prompt", ""))[::-1]
                self.answer(status, {"choices": [{"text": text}]})

            def answer(self, status, value):
                self.send_response(status)
                self.send_header("Retry-After", "3")
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

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


def test_half_a_surrogate_pair_ends_no_run(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "complete", lambda *_: "a\ud800")
    path = write_texts(teacher(server), ["x"], tmp_path / "t.jsonl")
    assert json.loads(path.read_text("utf-8"))["completion"] == "a?"


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


# Training by a teacher's text: `--teacher_url`


def asking(server, folder, rows=ROWS, **changes):
    """A trainer whose teacher is the server."""
    args = config(folder, method="seqkd", teacher_url=server.url, **changes)
    return DistillTrainer(llama(2), args, None, rows, ROWS[:2], processing_class=tokenizer())


def test_the_command_trains_on_what_our_own_server_writes(tmp_path, tmp_path_factory):
    """The student's tokenizer is not the teacher's: only text is exchanged."""
    folder = tiny.save(tmp_path_factory.mktemp("remote") / "tiny")
    llama(2).save_pretrained(tmp_path / "student")
    tokenizer().save_pretrained(tmp_path / "student")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS))
    values = {"model_name_or_path": str(tmp_path / "student"), "dataset_name": str(rows)}
    values |= {"max_completion_length": 6, "max_steps": 2}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(resolved(config(out, method="seqkd", **values))))
    with tiny.in_process(folder) as served:
        flags = ["--config", str(file), "--teacher_url", f"{served.url}/v1"]
        assert command(["distill", *flags]) == 0
    with tiny.load_engine(folder, drafter=None) as engine:
        made = engine.generate([row["prompt"] for row in ROWS], max_new_tokens=6)
    written = [json.loads(line) for line in (out / "teacher_text.jsonl").read_text().splitlines()]
    kept = [text.text for text in made if text.text.strip()]
    assert [row["completion"] for row in written] == kept and len(kept) > 4
    assert (out / "model.safetensors").is_file()


def test_a_run_learns_the_servers_texts_and_asks_once(server, tmp_path):
    run, decode = asking(server, tmp_path), tokenizer().decode
    told = [decode(row["completion_ids"], skip_special_tokens=True) for row in run.train_dataset]
    assert told == [row["prompt"][::-1] for row in ROWS]
    own = [decode(row["completion_ids"], skip_special_tokens=True) for row in run.eval_dataset]
    assert own == [row["completion"] for row in ROWS[:2]]
    limits = {body["max_tokens"] for _, _, body in server.asked}
    assert limits == {8} and len(server.asked) == len(ROWS) and run.teacher is None
    run.train()
    asking(server, tmp_path)
    assert len(server.asked) == len(ROWS)


def test_the_key_comes_from_the_environment_and_is_written_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv(API_KEY, "secret-key")
    run = asking(server, tmp_path)
    run.train()
    assert {key for _, key, _ in server.asked} == {"Bearer secret-key"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and all(b"secret-key" not in path.read_bytes() for path in written)


def test_rows_are_refused_before_anything_is_asked(server, tmp_path):
    rows = [ROWS[0], {"prompt": "x" * 99}]
    with pytest.raises(ConfigurationError, match="row 2: the prompt has 99 tokens"):
        asking(server, tmp_path, rows)
    with pytest.raises(ConfigurationError, match="rows of 'text'"):
        asking(server, tmp_path, [{"text": "hello"}])
    assert not server.asked
    asking(server, tmp_path, rows, skip_long_prompts=True)
    assert [body["prompt"] for _, _, body in server.asked] == [ROWS[0]["prompt"]]


def test_nothing_is_asked_before_evaluation_rows_and_weights_are_found_fit(
    server, tmp_path, monkeypatch
):
    llama(2).save_pretrained(tmp_path / "student")
    args = config(tmp_path / "run", method="seqkd", teacher_url=server.url)

    def build(student, evaluation):
        given = (args, None, ROWS, evaluation, tokenizer())
        with pytest.raises(RetortError) as caught:
            DistillTrainer(student, *given)
        assert not server.asked and not (tmp_path / "run").exists()
        return str(caught.value)

    assert "row 1" in build(llama(2), [{"prompt": "a", "completion": ""}])

    def unreadable(*_, **__):
        raise RetortError("weights that cannot be read")

    monkeypatch.setattr("retort.models.zoo.load_model", unreadable)
    assert "cannot be read" in build(str(tmp_path / "student"), ROWS[:2])


def test_a_server_of_several_models_needs_a_name(server, tmp_path):
    server.models = ["a", "b"]
    with pytest.raises(ConfigurationError, match=r"\['a', 'b'\]: name one of them"):
        asking(server, tmp_path)
    asking(server, tmp_path, teacher_served_model_name="b")
    assert {body["model"] for _, _, body in server.asked} == {"b"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"method": "mgsr"}, "compares the models' predictions"),
        ({"method": "kd"}, "compares the models' predictions"),
        ({"method": "distillm2"}, "compares the models' predictions"),
        ({"method": "sft"}, "never asked"),
        ({"method": "seqkd", "teacher_url": "localhost:8000"}, "http://"),
        ({"method": "sft", "teacher_url": None, "teacher_served_model_name": "m"}, "teacher_url"),
    ],
)
def test_what_a_text_cannot_teach_is_refused_by_name(tmp_path, values, named):
    with pytest.raises(ConfigurationError, match=named) as caught:
        config(tmp_path, **{"teacher_url": "http://127.0.0.1:1/v1", **values})
    assert "\n" not in str(caught.value) and values["method"] in str(caught.value)
