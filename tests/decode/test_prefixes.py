"""Rows that start from a kept prefix get what they would have computed, and less is read."""

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from retort.decode.engine import Engine
from retort.decode.padded import PaddedEngine
from retort.decode.params import SamplingParams
from retort.decode.prefixes import BLOCK
from retort.decode.scheduler import replay
from retort.errors import ConfigurationError
from retort.ops import native
from tests.decode.toys import toy
from tests.invariants.test_row_caches import poison
from tests.models import mambas, retnets

F32 = torch.float32
MODELS = {
    "attention": lambda: toy(),
    "native": lambda: toy(dtype=F32, head_dim=16),
    "retention": lambda: retnets.tiny(),
    "mamba": lambda: mambas.tiny(),
}
NEW = 12


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    if "torch" not in request.param and not native.available():
        pytest.skip(native.why_not())
    return MODELS[request.param]()


def texts(count=5, shared=50, seed=3):
    """Prompts that begin with the same tokens and go on differently."""
    generator = torch.Generator().manual_seed(seed)

    def some(n):
        return torch.randint(3, 30, (n,), generator=generator).tolist()

    system = some(shared)
    return [system + some(3 + 4 * i) * 2 for i in range(count)]


def run(model, prompts, together=1, poisoned=True, groups=None, new=NEW, **options):
    """Tokens and log-probabilities of prompts that arrive ``together`` at a time, and the engine.

    Whatever belongs to no row is NaN between steps.
    """
    drafter = "prompt-lookup" if isinstance(model, LlamaForCausalLM) else model
    options = {"drafter": drafter, "draft_budget": 3, "max_batch_size": 3, **options}
    params = SamplingParams(max_new_tokens=new, logprobs=0, ignore_eos=True)
    with Engine(model, **options, debug=True) as engine:
        if hasattr(engine.target.cache, "_poison"):
            engine.target.cache._poison = math.nan
        done, ids = {}, []
        for i, prompt in enumerate(prompts):
            group = groups[i] if groups else ""
            ids.append(engine.add_request(prompt, params, prefix_group=group))
            while engine.has_unfinished() and (i + 1) % together == 0:
                done |= {o.request_id: o for o in engine.step()}
                if poisoned:
                    poison(engine.target.cache)
        while engine.has_unfinished():
            done |= {o.request_id: o for o in engine.step()}
        assert engine.prefixes.tokens <= options.get("prefix_cache_tokens", 0)
    return [done[i] for i in ids], engine


def same(model, ours, theirs):
    assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            if isinstance(model, LlamaForCausalLM) and model.dtype == F32:
                assert a == b  # on the native core the bits do not depend on how passes were cut
            else:
                assert a == pytest.approx(b, abs=1e-9)


@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize("chunk", [7, 512])
def test_the_same_bits_with_fewer_tokens_read(model, together, chunk):
    plain, reader = run(model, texts(), together, max_prefill_tokens=chunk)
    kept, engine = run(model, texts(), together, max_prefill_tokens=chunk, prefix_cache_tokens=4096)
    same(model, kept, plain)
    assert engine.stats.accepted_tokens > 0
    read = reader.stats.prompt_tokens - engine.stats.prompt_tokens
    assert abs(read - engine.stats.prefix_hits) <= 5  # a prompt's last token may count as decoding
    assert engine.stats.prefix_queries == sum(map(len, texts()))
    assert engine.stats.prefix_hits > 0 or chunk == 512
    if together == 1:  # the first is read, the second ends a slice where both part, the third gains
        assert [o.stats.cached_tokens >= 48 for o in kept[2:]] == [True] * 3


def test_many_that_arrive_at_once_read_the_prefix_about_once(model):
    prompts = texts(count=6, shared=96)
    _, engine = run(
        model,
        prompts,
        together=6,
        prefix_cache_tokens=4096,
        max_prefill_tokens=64,
        max_batch_size=6,
    )
    assert engine.stats.prefix_hits >= 3 * 96


def test_the_same_prompt_again_and_a_chats_next_turn(model):
    first = texts(count=1)[0]
    (output,), _ = run(model, [first])
    turn = [*first, *output.token_ids, *range(5, 25)]
    plain, _ = run(model, [first, turn, first, turn, turn])
    kept, _ = run(model, [first, turn, first, turn, turn], prefix_cache_tokens=4096)
    same(model, kept, plain)
    assert kept[1].stats.cached_tokens >= len(first) // BLOCK * BLOCK - BLOCK
    assert kept[4].stats.cached_tokens == (len(turn) - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("most", [16, 64, 160])
def test_the_least_recently_used_go_first(model, most):
    prompts = texts(count=3) + texts(count=3, seed=9) + texts(count=3)
    plain, _ = run(model, prompts, together=2)
    kept, engine = run(model, prompts, together=2, prefix_cache_tokens=most)
    same(model, kept, plain)
    assert engine.prefixes.tokens <= most


def test_eviction_spares_what_was_used_last():
    model, old, new = toy(), texts(count=3), texts(count=3, seed=9)
    order = [old[0], old[1], new[0], old[2]]
    _, engine = run(model, order, prefix_cache_tokens=128)
    assert engine.stats.prefix_hits == 96  # old[1] and old[2] both find the 48 shared tokens
    _, engine = run(model, [old[0], *new, old[1]], prefix_cache_tokens=80)
    assert engine.stats.prefix_hits == 96  # new[1] and new[2]; they pushed out what was old


def test_groups_never_share(model):
    prompts = [p for p in texts(count=3) for _ in range(2)]
    groups = ["a", "b"] * 3
    alone, _ = run(model, texts(count=3), prefix_cache_tokens=4096)
    kept, _ = run(model, prompts, groups=groups, prefix_cache_tokens=4096)
    assert [o.stats.cached_tokens for o in kept[0::2]] == [o.stats.cached_tokens for o in alone]
    assert [o.stats.cached_tokens for o in kept[1::2]] == [o.stats.cached_tokens for o in alone]
    assert kept[1].stats.cached_tokens == 0


def test_preempted_rows_come_back(model):
    prompts = texts(count=6)
    plain, _ = run(model, prompts, together=6, new=40)
    limits = {"max_cached_tokens": 140, "prefix_cache_tokens": 4096, "max_prefill_tokens": 40}
    kept, engine = run(model, prompts, together=6, new=40, **limits)
    same(model, kept, plain)
    assert engine.stats.preemptions > 0 and engine.stats.prefix_hits > 0
    scheduler = engine.scheduler
    assert scheduler.decisions == replay(
        scheduler.events,
        max_batch_size=3,
        max_prefill_tokens=40,
        max_cached_tokens=140,
        max_draft=scheduler.max_draft,
    )


def test_scored_prompts_are_read_whole(model):
    prompt = texts(count=1)[0]
    with Engine(model, prefix_cache_tokens=4096) as engine:
        first = engine.generate(prompt, max_new_tokens=2, prompt_logprobs=0)[0]
        again = engine.generate(prompt, max_new_tokens=2, prompt_logprobs=0)[0]
    assert len(again.prompt_logprobs) == len(prompt) - 1
    assert again.prompt_logprobs == first.prompt_logprobs
    assert again.stats.cached_tokens == 0


def test_a_row_that_failed_leaves_nothing_behind(monkeypatch):
    model, prompt = toy(), texts(count=1)[0]
    with Engine(model, prefix_cache_tokens=4096) as engine:
        expected = engine.generate(prompt, max_new_tokens=NEW)[0].token_ids
        engine.prefixes.clear()
        forward = engine.target.forward
        with monkeypatch.context() as patch:
            patch.setattr(engine.target, "forward", lambda *_, **__: 1 / 0)
            engine.add_request(prompt, request_id="broken")
            with pytest.raises(ZeroDivisionError):
                engine.step()
            engine.abort("broken")
        assert engine.target.forward == forward and engine.prefixes.tokens == 0
        assert engine.generate(prompt, max_new_tokens=NEW)[0].token_ids == expected


def test_off_by_default_and_what_is_refused():
    model = toy()
    with Engine(model) as engine:
        engine.generate(texts(count=2), max_new_tokens=2)
        assert not engine.prefixes.enabled and engine.stats.prefix_queries == 0
    for wrong in (-1, 1.5, True, None):
        with pytest.raises(ConfigurationError, match="prefix_cache_tokens"):
            Engine(model, prefix_cache_tokens=wrong)
    with pytest.raises(ConfigurationError, match="cannot keep prefixes"):
        PaddedEngine(model, prefix_cache_tokens=64)


def test_pieces_outside_a_row_are_refused(model):
    with Engine(model) as engine:
        row = engine.target.add_row()
        engine.target.forward([(row, [5] * 20)], [1])
        for start, stop in ((0, 21), (-1, 4), (4, 4)):
            with pytest.raises(ConfigurationError, match="has no piece"):
                engine.target.cache.piece(row, start, stop)
        if not engine.target.cache.divisible:
            with pytest.raises(ConfigurationError, match="has no piece"):
                engine.target.cache.piece(row, 0, 16)
