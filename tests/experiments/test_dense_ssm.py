"""The experiment on the dense connection: its cells, its recall task, its table."""

import json
import sys

import numpy as np
import pytest
import torch

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))

from experiments.dense_ssm import cells, decode, mqar, table, training


@pytest.mark.parametrize("corpus", ["wikitext2", "mqar"])
@pytest.mark.parametrize("family", cells.FAMILIES)
def test_all_variants_have_equal_size(corpus, family):
    counts = {}
    for variant in cells.VARIANTS[family]:
        vocabulary = mqar.VOCABULARY if corpus == "mqar" else cells.VOCABULARY
        values = cells.model_config(corpus, family, variant, vocabulary)
        counts[variant] = cells.parameters(family, **values)
    assert max(counts.values()) / min(counts.values()) < 1.025, counts
    assert counts["m0"] > 0.99 * counts["m2"]  # what is left of a difference favours the base


def test_the_plan_tunes_a_variant_before_it_asks_for_its_rate_and_repeats_nothing():
    done = set()

    def best(corpus, family, variant):
        rates = {
            c.learning_rate
            for c in done
            if (c.corpus, c.family, c.variant, c.grid) == (corpus, family, variant, True)
        }
        assert rates == set(cells.GRID[family]), (corpus, family, variant)
        return min(rates)

    for cell in cells.plan(best):
        assert cell not in done
        done.add(cell)
    assert len({c.name for c in done}) == len(done)
    for family in cells.FAMILIES:
        for variant in cells.MAIN[family]:
            seeds = {
                c.seed
                for c in done
                if (c.corpus, c.family, c.variant, c.grid) == ("wikitext2", family, variant, False)
            }
            assert seeds == {1, 2, 3}


def test_recall_asks_for_every_pair_once_and_only_answers_count():
    data = mqar.Recall(50, seed=3)
    for index in (0, 49):
        row, again = data[index], data[index]
        assert np.array_equal(row["input_ids"], again["input_ids"])
        ids = row["input_ids"].tolist()
        half = 2 * mqar.PAIRS
        pairs = dict(zip(ids[:half:2], ids[1:half:2], strict=True))
        assert len(pairs) == mqar.PAIRS
        asked = list(zip(ids[half::2], ids[half + 1 :: 2], strict=True))
        assert sorted(key for key, _ in asked) == sorted(pairs)
        assert all(pairs[key] == value for key, value in asked)
        scored = [i for i, label in enumerate(row["labels"]) if label != mqar.IGNORED]
        assert scored == list(range(half + 1, 2 * half, 2))
        assert [row["labels"][i] for i in scored] == [value for _, value in asked]
    assert not np.array_equal(data[0]["input_ids"], mqar.Recall(50, seed=4)[0]["input_ids"])


class Looks(torch.nn.Module):
    """Answers from the sequence itself, and wrongly for one key."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward(self, input_ids):
        from transformers.modeling_outputs import CausalLMOutput

        logits = torch.zeros(*input_ids.shape, mqar.VOCABULARY)
        for b, row in enumerate(input_ids.tolist()):
            for t, key in enumerate(row):
                answer = row[row.index(key) + 1]
                logits[b, t, 0 if key == self.wrong else answer] = 1
        return CausalLMOutput(logits=logits)


def test_accuracy_counts_answers():
    data = mqar.Recall(30, seed=1)
    assert mqar.accuracy(Looks(wrong=-1), data, batch=7) == 1
    misses = sum(5 in data[i]["input_ids"][: 2 * mqar.PAIRS : 2] for i in range(30))
    want = 1 - misses / (30 * mqar.PAIRS)
    assert misses > 0 and mqar.accuracy(Looks(wrong=5), data, batch=7) == pytest.approx(want)


def result(family, variant, seed, loss, grid=False, rate=1e-3):
    return {
        "cell": {"corpus": "wikitext2", "family": family, "variant": variant, "seed": seed}
        | {"learning_rate": rate, "grid": grid, "steps": 3},
        "evaluation": {"eval_loss": loss, "eval_perplexity": 2**loss, "eval_bits_per_byte": loss},
        "model": {"hidden_size": 8, "parameters": 1234},
        "training": {"cpu_seconds_a_step": 0.5, "wall_seconds_a_step": 1.0},
    }


def test_the_table_shows_paired_differences_and_spreads(tmp_path):
    made = [
        result("retnet", v, s, base + s / 10)
        for v, base in (("m0", 3), ("m2", 2.5))
        for s in (1, 2, 3)
    ]
    made += [result("retnet", "m0", 0, loss, True, rate) for rate, loss in ((1e-3, 5), (3e-3, 4))]
    for i, record in enumerate(made):
        (tmp_path / f"cell-{i}-s1.json").write_text(json.dumps(record))
    table.write(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| retnet | m2 | 8 | 1,234 | 0.001 | 3 |" in text
    assert "2.7000 ± 0.1000 | -0.5000 ± 0.0000 | 500 |" in text
    assert table.best_rate(tmp_path, "wikitext2", "retnet", "m0") == 3e-3
    plot = (tmp_path / "plot.svg").read_text()
    assert plot.count("<circle") == 6 and plot.count("<line") == 4
    import xml.etree.ElementTree as tree

    tree.fromstring(plot)


def test_a_cell_writes_its_result_and_gives_it_again(tmp_path, monkeypatch):
    """The whole path at toy size."""
    monkeypatch.setitem(cells.STEPS, "mqar", 4)
    monkeypatch.setattr(mqar, "TEST", 20)
    cell = cells.Cell("mqar", "retnet", "m2", 1e-3, 1)
    found = training.run_cell(cell, tmp_path, tmp_path / "work", tmp_path / "results")
    assert found["evaluation"].keys() >= {"eval_loss", "accuracy"}
    assert found["model"]["parameters"] == cells.parameters(
        "retnet", **cells.model_config("mqar", "retnet", "m2", mqar.VOCABULARY)
    )
    stored = json.loads((tmp_path / "results" / f"{cell.name}.json").read_text())
    assert stored["evaluation"] == found["evaluation"]
    assert not list((tmp_path / "work").iterdir())
    again = training.run_cell(cell, tmp_path, tmp_path / "other", tmp_path / "again")
    assert again["evaluation"] == found["evaluation"]


def test_decoding_is_measured_for_every_model(monkeypatch):
    monkeypatch.setattr(decode, "STEPS", 1)
    records = decode.measure((8, 20), rounds=1)
    assert len(records) == 2 * 5
    by = {(r["model"], r["context"]): r for r in records}
    sizes = [r["parameters"] for r in records]
    assert max(sizes) / min(sizes) < 1.06
    assert by["llama", 20]["bytes"] >= by["llama", 8]["bytes"] > 0
    assert all(r["tokens_per_cpu_second"] > 0 for r in records)
