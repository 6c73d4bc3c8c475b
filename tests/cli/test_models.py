"""``retort models``, ``pull`` and ``env``."""

import json

from retort import cli


def test_models_table_and_json(capsys):
    assert cli.run(["models"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["name", "parameters", "size", "licence", "cached", "weights"]
    assert table[1].startswith("smollm2-135m-instruct")
    assert cli.run(["models", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "smollm2-135m-instruct"
    assert row["licence"] == "Apache-2.0"
    assert isinstance(row["cached"], bool)


def test_models_of_an_empty_cache(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RETORT_CACHE", str(tmp_path))
    monkeypatch.setattr("retort.models.zoo._in_hub_cache", lambda hub_id: None)
    cli.run(["models", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["cached"] is False


def test_pull_prints_the_folder_alone(capsys, zoo_folder):
    assert cli.run(["pull", "smollm2-135m-instruct"]) == 0
    assert capsys.readouterr().out == f"{zoo_folder}\n"
    assert cli.run(["pull", "smollm2-135m-instruct", "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(zoo_folder)


def test_env_names_versions_devices_and_backend(capsys):
    assert cli.run(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cpu_backend"] in ("native", "torch")
    assert facts["devices"][0] == "cpu"
    assert facts["threads"] >= 1
    assert facts["versions"]["transformers"].startswith("5.")
    assert cli.run(["env"]) == 0
    assert "cpu_backend" in capsys.readouterr().out
