"""No added compute and no added memory, counted: tokens through linears, keys read, bytes held."""

import pytest
import torch
from torch import nn

import retort.cache.attention as attention_module
from retort.decode.drafting import Drafting
from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from retort.ops import native
from tests.decode.test_engine import ScriptedDrafter
from tests.decode.toys import prompts, reference, toy

NEW, LAYERS = 14, 2


class Counts:
    """What one pass fed: its rows' lengths after it, and its tokens, by what was asked for."""

    def __init__(self, monkeypatch):
        self.linear, self.keys, self.passes = [], [], []
        forward, propose = PackedModel.forward, Drafting.propose
        attend = attention_module.row_attention
        self.drafted = {}

        def spy_propose(drafting, rows, *args, **options):
            drafts = propose(drafting, rows, *args, **options)
            self.drafted = {r.row: len(d) for r, d in zip(rows, drafts, strict=True)}
            return drafts

        def spy_forward(packed, feeds, keep, *args, **options):
            before = {row: packed.length(row) for row, _ in feeds}
            self.linear, self.keys = [], []
            logits = forward(packed, feeds, keep, *args, **options)
            self.passes.append((before, feeds, self.drafted, self.linear, self.keys))
            self.drafted = {}
            return logits

        def spy_attend(query, keys, values, **options):
            self.keys.append(keys.shape[1])
            return attend(query, keys, values, **options)

        monkeypatch.setattr(Drafting, "propose", spy_propose)
        monkeypatch.setattr(PackedModel, "forward", spy_forward)
        monkeypatch.setattr(attention_module, "row_attention", spy_attend)

    def watch(self, model):
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(
                    lambda _, given: self.linear.append(given[0].shape[:-1].numel())
                )


@pytest.mark.parametrize("kind", ["right", "wrong", "random, sometimes none"])
def test_a_step_computes_its_rows_tokens_and_reads_their_keys_and_no_more(monkeypatch, kind):
    model = toy(num_hidden_layers=LAYERS, eos_token_id=None)
    texts = prompts((5, 11, 3, 14))
    expected = [reference(model, p, max_new_tokens=NEW) for p in texts]
    answers = [p + e + [0] * 8 for p, e in zip(texts, expected, strict=True)]
    counts = Counts(monkeypatch)
    counts.watch(model)
    with Engine(model, drafter=ScriptedDrafter(kind, answers), draft_budget=5) as engine:
        outputs = engine.generate(texts, max_new_tokens=NEW)
    assert [o.token_ids for o in outputs] == expected
    ragged = 0
    for before, feeds, drafted, linear, keys in counts.passes[1:]:  # the first reads the prompts
        assert set(drafted) == set(before)
        total = sum(1 + k for k in drafted.values())
        assert sum(len(tokens) for _, tokens in feeds) == total
        assert set(linear) == {total} and len(linear) == 7 * LAYERS
        lengths = [before[row] + 1 + drafted[row] for row, _ in feeds]
        assert keys == lengths * LAYERS
        ragged += len(set(drafted.values())) > 1
    assert (ragged > 0) == (kind not in ("right", "wrong"))


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_rows_of_16_to_4096_tokens_hold_at_most_twice_what_they_need(backend):
    """At every step; a prompt that is read in slices has its whole room from the first one on."""
    if backend == "native" and not native.available():
        pytest.skip("no native core")
    sizes = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = toy(max_position_embeddings=8192, eos_token_id=None, dtype=torch.float32, **sizes)
    draft = 6
    texts = [[3 + i % 90 for i in range(n)] for n in (16, 40, 129, 1000, 4096)]
    with Engine(model, drafter="prompt-lookup", draft_budget=draft, cpu_backend=backend) as engine:
        cache = engine.target.cache
        requests = [engine.request(engine.add_request(p)) for p in texts]
        reading, decoding = [], []
        while min(len(r.output) for r in requests) < 40:
            engine.step()
            seated = [(r, cache.length(r.row)) for r in requests if r.row >= 0]
            tokens = sum(max(n, len(r.prompt)) + draft for r, n in seated if n)
            needed = tokens * 2 * 2 * 16 * 4  # keys and values, two heads of 16 floats
            whole = all(r.decoding for r in requests)
            (decoding if whole else reading).append(cache.allocated_bytes / needed)
        assert engine.stats.draft_tokens > 0
    assert len(decoding) >= 5 and max(decoding) <= 2
    assert len(reading) >= 9 and max(reading) <= 2
