"""``retort bench decode`` on a tiny model: arms in turns, equal outputs, JSON and page."""

import json
import sys

import pytest

from retort import cli
from retort.bench import arms
from retort.bench.peers.process import PEERS
from retort.decode.draft import DraftContext
from tests.serve import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = [("long", "one two three one two three one two"), ("long", "a b"), ("short", "c")]
    texts += [("short", "d")]
    path.write_text("".join(json.dumps({"category": c, "prompt": t}) + "\n" for c, t in texts))
    return path


def bench(folder, prompts, out, *flags):
    given = ["--prompts", str(prompts), "--model", str(folder), "--output", str(out)]
    few = ["--max-new-tokens", "6", "--repeats", "2", "--prompt-tokens", "60", "--threads", "1"]
    return cli.run(["bench", "decode", *given, *few, "--batch-sizes", "1", *flags])


def test_every_arm_decodes_the_same_tokens(folder, prompts, tmp_path):
    out = tmp_path / "r.json"
    chosen = ["plain", "auto", "padded k=7", "hopeless", "hopeless model", *arms.TRANSFORMERS[:2]]
    chosen += ["draft model", "draft model k=4"]
    sizes = ["--batch-sizes", "1", "2", "--num-prompts", "2", "--draft-model", str(folder)]
    flags = ["--category", "long", "short", *sizes, "--arms", *chosen]
    assert bench(folder, prompts, out, *flags) == 0
    data = json.loads(out.read_text())
    assert [r["arm"] for r in data["results"][: len(chosen)]] == chosen
    assert len(data["results"]) == 4 * len(chosen)
    assert all(r["equal_to_plain"] for r in data["results"])
    assert [(r["batch_size"], r["prompts"]) for r in data["results"][:: len(chosen)]] == [
        (1, 2), (2, 2), (1, 2), (2, 2),
    ]  # fmt: skip
    drafted = {r["arm"]: r["drafted_rows"] for r in data["results"] if r["category"] == "short"}
    assert drafted["plain"] == 0 and drafted["padded k=7"] > 0
    own = next(r for r in data["results"] if r["arm"] == "draft model k=4")
    assert own["accepted_tokens"] == own["draft_tokens"] > 0  # the model drafts for itself
    assert {r["category"] for r in data["results"]} == {"long", "short"}
    page = out.with_suffix(".html").read_text()
    assert page.count("<section") == 2 and "http" not in page.replace("http://www.w3.org", "")


def test_drawn_texts_are_equal_in_all_arms_too(folder, prompts, tmp_path):
    out = tmp_path / "r.json"
    flags = ["--temperature", "0.8", "--top-p", "0.9", "--batch-sizes", "2", "--arms", "plain"]
    flags += ["draft model k=4", "unpadded k=7", "--draft-model", str(folder), "--category", "long"]
    assert bench(folder, prompts, out, *flags, "--seed", "1") == 0
    rows = {r["arm"]: r for r in json.loads(out.read_text())["results"]}
    assert all(r["equal_to_plain"] for r in rows.values())
    assert rows["draft model k=4"]["accepted_tokens"] > 0


def test_other_engines_draw_other_texts(folder, prompts, tmp_path, capsys):
    flags = ["--temperature", "0.8", "--arms", "plain", "transformers"]
    assert bench(folder, prompts, tmp_path / "r.json", *flags) == 2
    assert "other engines draw other texts" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("joined", [False, True])
def test_the_record_names_files_and_no_folder(folder, prompts, tmp_path, monkeypatch, joined):
    given = [f"--prompts={prompts}"] if joined else ["--prompts", str(prompts)]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/retort", "bench", "decode", *given])
    assert bench(folder, prompts, tmp_path / "r.json", "--arms", "plain") == 0
    text = (tmp_path / "r.json").read_text()
    record = json.loads(text)["provenance"]
    assert record["arguments"]["prompts"] == "prompts.jsonl"
    assert record["command"][-1].endswith("prompts.jsonl") and str(tmp_path.parent) not in text


PEER = """
import json, os, sys
script, told = os.path.basename(sys.argv[1]), {"engine": "fake", "mode": sys.argv[4]}
print(json.dumps(told | {"script": script}), flush=True)
for line in sys.stdin:
    rows = [[5] * json.loads(line)["max_new_tokens"] for _ in json.loads(line)["prompts"]]
    print(json.dumps({"token_ids": rows, "tokens": 5, "seconds": 2.0, "total_seconds": 3.0}))
    sys.stdout.flush()
"""


ENGINES = pytest.mark.parametrize("engine", PEERS, ids=[peer.name for peer in PEERS])


def peer(engine, folder, source):
    """Flags of a peer whose Python is a script of ours, and whose model is a file."""
    python, model = folder / "python", folder / "exported"
    python.write_text(f"#!{sys.executable}\n{source}")
    python.chmod(0o755)
    model.touch()
    return [engine.flag, str(python), f"{engine.flag}-model", str(model)]


@ENGINES
def test_a_peer_is_an_arm_and_its_settings_are_in_the_record(folder, prompts, tmp_path, engine):
    out = tmp_path / "r.json"
    flags = peer(engine, tmp_path, PEER)
    assert bench(folder, prompts, out, "--arms", "plain", *flags) == 0
    data = json.loads(out.read_text())
    modes = {name: (told["script"], told["mode"]) for name, told in data["peers"].items()}
    plain = f"{engine.name} plain"
    lookup = (engine.script, "lookup")
    assert modes == {plain: (engine.script, "plain"), f"{engine.name} lookup": lookup}
    theirs = [r for r in data["results"] if r["arm"] == plain]
    assert theirs[0]["tokens_per_second"] == 2.5 and theirs[0]["prefill_seconds"] == 1.0
    assert not theirs[0]["equal_to_plain"]
    assert "fake" in out.with_suffix(".html").read_text()


def test_peers_stand_beside_one_another(folder, prompts, tmp_path):
    flags = [flag for engine in PEERS for flag in peer(engine, tmp_path, PEER)]
    assert bench(folder, prompts, tmp_path / "r.json", "--arms", "plain", *flags) == 0
    told = [r["arm"] for r in json.loads((tmp_path / "r.json").read_text())["results"]]
    theirs = ["openvino plain", "openvino lookup", "llama.cpp plain", "llama.cpp lookup"]
    assert told == ["plain", *theirs]


@ENGINES
def test_a_peer_that_does_not_start_is_an_error(folder, prompts, tmp_path, capsys, engine):
    flags = peer(engine, tmp_path, "raise SystemExit(3)")
    assert bench(folder, prompts, tmp_path / "r.json", "--arms", "plain", *flags) == 2
    assert f"could not start {engine.title} on" in capsys.readouterr().err


@ENGINES
@pytest.mark.parametrize("last", ["input()", ""], ids=["asked", "unasked"])
def test_a_peer_that_ends_in_between_is_an_error(folder, prompts, tmp_path, capsys, engine, last):
    flags = peer(engine, tmp_path, f"print('{{}}', flush=True)\n{last}")
    assert bench(folder, prompts, tmp_path / "r.json", "--arms", "plain", *flags) == 2
    assert f"gave up decoding with {engine.title} on" in capsys.readouterr().err


@ENGINES
@pytest.mark.parametrize("gone", ["python", "exported"])
def test_a_peer_that_is_not_there_is_named(folder, prompts, tmp_path, capsys, engine, gone):
    flags = peer(engine, tmp_path, PEER)
    (tmp_path / gone).unlink()
    assert bench(folder, prompts, tmp_path / "r.json", "--arms", "plain", *flags) == 2
    said = capsys.readouterr().err
    flag = engine.flag if gone == "python" else f"{engine.flag}-model"
    assert said.count("\n") == 1 and f"{flag}: there is no" in said and gone in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arms", "plan"], "--arms plan"),
        (["--category", "lung"], "no prompts of category"),
        (["--prompt-tokens", "2"], "leaves no room"),
        (["--openvino", "python"], "--openvino and --openvino-model go together"),
        (["--llama-cpp-model", "a.gguf"], "--llama-cpp and --llama-cpp-model go together"),
        (["--category", "short", "--batch-sizes", "3"], "has 2 prompts of category 'short' and 3"),
        (["--batch-sizes", "1", "3", "--num-prompts", "2"], "none below it"),
        (["--batch-sizes", "1", "3", "--num-prompts", "2", "3", "3"], "one for each"),
    ],
)
def test_what_is_not_there_is_named(folder, prompts, tmp_path, capsys, flags, said):
    assert bench(folder, prompts, tmp_path / "r.json", *flags) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("line", ["x", "{}", '{"prompt": 3}'])
def test_a_line_without_a_prompt_is_one_line_of_error(folder, tmp_path, capsys, line):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    assert bench(folder, tmp_path / "p.jsonl", tmp_path / "r.json") == 2
    assert "p.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch-sizes", "--repeats", "--max-new-tokens", "--threads"])
def test_numbers_are_positive(folder, prompts, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as ended:
        bench(folder, prompts, tmp_path / "r.json", flag, "0")
    assert ended.value.code == 2 and flag in capsys.readouterr().err


def test_the_hopeless_drafter_is_wrong_and_within_its_limit():
    drafts = arms.Hopeless().propose([DraftContext("a", [1, 2, 3], 4)])
    assert drafts == [[3, 3, 3, 3]]
