"""T25: checkpoints and models that were made to run code, or to be read from elsewhere.

All through the commands: exit code 2, one line, no canary, nothing written.
"""

import json
import os
import shutil

import pytest
import torch
import yaml

from retort.cli import run as command
from retort.distill.run import run
from retort.errors import ConfigurationError
from retort.manifest import MANIFEST, write_manifest
from retort.train import checkpoint
from retort.train.arguments import resolved
from tests.distill.toys import config_of_parts, save_parts, trainer

CANARY = "canary"


class Evil:
    """A pickle that would leave a folder behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model that teaches and learns, rows, and a run of two steps with a checkpoint."""
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    run(config_of_parts(folder, folder / "run", max_steps=2))
    return folder


@pytest.fixture
def refusal(tmp_path, capsys):
    """What a command says that is refused."""

    def said(*arguments):
        code = command([str(argument) for argument in arguments])
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("retort: ")]
        assert code == 2 and len(lines) == 1, lines
        assert not (tmp_path / CANARY).exists()
        return lines[0]

    return said


# Checkpoints whose manifest fits


@pytest.fixture(params=["found", "named"])
def resumed(request, parts, tmp_path, refusal):
    """What the command says of a run's checkpoint that ``spoil`` changes, found or named."""
    folder = tmp_path / "run"
    shutil.copytree(parts / "run", folder)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(resolved(config_of_parts(parts, folder))))
    place = folder / "checkpoint-2"
    named = [] if request.param == "found" else ["--resume_from_checkpoint", place]

    def said(spoil):
        spoil(place)
        before = contents(folder)
        line = refusal("distill", "--config", tmp_path / "run.yaml", *named)
        assert contents(folder) == before
        assert f"cannot resume from {place}: " in line
        return line

    return said


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != checkpoint.LOCK)
    return {path: path.read_bytes() for path in files}


def refit(place):
    write_manifest(place, {"step": 2})


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_model.bin", "other/adapter_model.bin", "weights.pkl"]
)
@pytest.mark.parametrize("kept", [True, False])
def test_pickled_weights_are_refused(resumed, tmp_path, name, kept):
    """T25: beside safetensors and in their place, found by the command or named."""

    def spoil(place):
        (place / name).parent.mkdir(exist_ok=True)
        torch.save({"lm_head.weight": Evil(tmp_path / CANARY)}, place / name)
        if not kept:
            (place / "model.safetensors").unlink()
        refit(place)

    assert f"{name} is a pickle, which can run code" in resumed(spoil)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickled_states_run_nothing(resumed, tmp_path, name):
    """T25: files that transformers reads, which may hold tensors and numbers alone."""

    def spoil(place):
        assert (place / name).is_file()
        torch.save({"state": Evil(tmp_path / CANARY)}, place / name)
        refit(place)

    assert f"{name} does not hold bare tensors (UnpicklingError)" in resumed(spoil)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("keep", [0, 100, -8])
def test_truncated_files_are_refused_where_the_manifest_fits(resumed, name, keep):
    """T25."""

    def spoil(place):
        (place / name).write_bytes((place / name).read_bytes()[:keep])
        refit(place)

    assert f"{name} does not hold" in resumed(spoil)


@pytest.mark.parametrize("name", ["model.safetensors", "other"])
def test_links_are_refused(resumed, parts, name):
    """T25: to a file or a folder, wherever they lead."""

    def spoil(place):
        if name == "other":
            (place / name).symlink_to(parts / "model")
        else:
            (place / name).unlink()
            (place / name).symlink_to(parts / "model" / name)
        refit(place)

    assert f"{name} is a link" in resumed(spoil)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../../../x", "..\\x"])
@pytest.mark.parametrize("where", [MANIFEST, "model.safetensors.index.json"])
def test_names_out_of_the_folder_are_refused_and_not_read(resumed, monkeypatch, name, where):
    """T25: in the manifest, and in an index of weights."""

    def spoil(place):
        if where == MANIFEST:
            facts = json.loads((place / MANIFEST).read_text())
            facts["files"] = {name: "0" * 64, **facts["files"]}
            (place / MANIFEST).write_text(json.dumps(facts))
        else:
            (place / where).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
            refit(place)
        monkeypatch.setattr("retort.manifest.sha256", lambda path: pytest.fail(f"read {path}"))

    assert f"names {name!r}, which is not in it" in resumed(spoil)


def test_the_best_checkpoint_that_a_file_names_is_checked_too(tmp_path):
    """T25: at the end of a run its weights are read from where `trainer_state.json` says."""
    made = trainer(tmp_path / "run", method="sft")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save({"lm_head.weight": Evil(tmp_path / CANARY)}, elsewhere / "pytorch_model.bin")
    refit(elsewhere)
    made.state.best_model_checkpoint = str(elsewhere)
    with pytest.raises(ConfigurationError, match="is a pickle"):
        made._load_best_model()
    assert not (tmp_path / CANARY).exists()


# Models


def pickled(folder, canary):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(canary)}, folder / "pytorch_model.bin")


def mapped(folder, canary):
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    facts = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    changed = {**facts, "model_type": "evil", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(changed))


def truncated(folder, _):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


SPOILED = {
    pickled: "only pickled weights",
    mapped: "cannot load the config of",
    truncated: "damaged or not safetensors",
}


@pytest.fixture(params=SPOILED, ids=lambda spoil: spoil.__name__)
def spoiled(request, parts, tmp_path, monkeypatch):
    """A model's folder, and what is said of it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    folder = shutil.copytree(parts / "model", tmp_path / "spoiled")
    request.param(folder, tmp_path / CANARY)
    return folder, SPOILED[request.param]


@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_a_hostile_model_is_not_distilled(refusal, parts, tmp_path, spoiled, role):
    """T25: as student and as teacher."""
    folder, message = spoiled
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(resolved(config_of_parts(parts, tmp_path / "run", method="kd")))
    )
    models = {"model": parts / "model", "teacher_model": parts / "model", role: folder}
    flags = [text for name, path in models.items() for text in (f"--{name}_name_or_path", path)]
    line = refusal("distill", "--config", tmp_path / "run.yaml", *flags)
    assert message in line and str(folder) in line
    assert not (tmp_path / "run").exists()


def test_a_hostile_model_is_not_captured(refusal, parts, tmp_path, spoiled):
    """T25."""
    folder, message = spoiled
    line = refusal("capture", folder, parts / "rows.jsonl", tmp_path / "capture")
    assert message in line and str(folder) in line
    assert not (tmp_path / "capture").exists()
