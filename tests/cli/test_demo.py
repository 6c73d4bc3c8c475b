"""``retort demo``: what it refuses before it writes anything."""

import pytest

from retort import cli


@pytest.mark.parametrize(
    ("model", "message"),
    [("smollm2-135m-instrukt", "nearest known: smollm2-135m-instruct"), ("mamba", "mamba: ")],
)
def test_a_refused_model_leaves_nothing_behind(capsys, monkeypatch, tmp_path, model, message):
    from transformers import MambaConfig

    MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1).save_pretrained(
        tmp_path / "mamba"
    )
    (tmp_path / "mamba" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("retort.models.loader.load_model", lambda *_, **__: pytest.fail("loaded"))
    name = "./mamba" if model == "mamba" else model
    assert cli.run(["demo", "--quick", "--output-dir", "run", "--model", name]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
