"""Other engines behind the same server: a state-space model, and a cache that is too small."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from retort import DenseRetNetConfig, DenseRetNetForCausalLM
from retort.models.zoo import load_tokenizer
from retort.serve.client import Limits
from tests.serve import tiny
from tests.serve.test_rows import TEXTS, together


@pytest.fixture
def bodies():
    return [{"prompt": t, "max_tokens": 40, "temperature": 0} for t in TEXTS]


def test_a_state_space_model_is_served_the_same_way(folder, bodies, tmp_path):
    torch.manual_seed(1)
    config = DenseRetNetConfig(
        vocab_size=len(load_tokenizer(folder)),
        hidden_size=32,
        query_key_dim=16,
        num_heads=2,
        num_hidden_layers=2,
        dense_block_layers=1,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    model = DenseRetNetForCausalLM(config).eval()
    tokenizer = load_tokenizer(folder)
    with tiny.Engine(model, tokenizer) as plain:
        expected = [plain.generate(b["prompt"], max_new_tokens=40)[0].text for b in bodies]
    engine = tiny.Engine(
        model, tokenizer, drafter="prompt-lookup", draft_budget=4, max_batch_size=8
    )
    with tiny.in_process(folder, engine=engine) as served:
        answers = together(served, bodies)
        assert [a.json()["choices"][0]["text"] for a in answers] == expected
        assert served.metric("spec_decode_num_draft_tokens") > 0


def test_rows_make_room_when_the_cache_is_full(folder, engine, bodies):
    expected = [engine.generate(b["prompt"], max_new_tokens=40)[0].text for b in bodies]
    small = tiny.load_engine(folder, max_batch_size=4, max_cached_tokens=90)
    limits = Limits(max_num_seqs=4)
    with tiny.in_process(folder, engine=small, limits=limits) as served:
        answers = at_once(served, bodies)
        assert [a.json()["choices"][0]["text"] for a in answers] == expected
        assert served.metric("num_preemptions") > 0


def at_once(served, bodies):
    """Answers of requests that were all let in before the first step."""
    with tiny.held(served.engine) as go, ThreadPoolExecutor(1) as pool:
        answers = pool.submit(together, served, bodies)
        tiny.eventually(lambda: served.state["client"].rows == len(bodies))
        go.set()
        return answers.result(120)


def test_a_long_prompt_does_not_hold_up_others(folder):
    """While a long prompt is read in slices, a decoding row gains a token in every step."""
    engine = tiny.load_engine(folder, drafter=None, max_prefill_tokens=16)
    with tiny.in_process(folder, engine=engine) as served:
        gains, step = [], engine.step

        def watch():
            rows = {r.id: len(r.tokens) for r in engine.scheduler.running if r.decoding}
            reading = any(not r.decoding for r in engine.scheduler.running)
            finished = step()
            if reading:
                gains.extend(len(engine._roster.requests[i].tokens) - n for i, n in rows.items())
            return finished

        engine.step = watch
        body = {"prompt": "the cat", "max_tokens": 480, "temperature": 0, "ignore_eos": True}
        with (
            tiny.held(engine, after=5) as go,
            served.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as short,
            ThreadPoolExecutor(1) as pool,
        ):
            lines = short.iter_lines()  # held: a dropped iterator would close the stream
            next(lines)
            long = pool.submit(served.complete, prompt=[5] * 400, max_tokens=2)
            tiny.eventually(lambda: served.state["client"].rows == 2)
            go.set()
            long.result(120)
        assert len(gains) > 20 and set(gains) == {1}
