"""Each preset against a short description of its paper that imports nothing of what it checks.

A description gives the (completion, loss or losses, weight) that one row of data turns into, with
plain loops over the models and the formulas of `naive`. Texts are the likeliest ones here, so that
they can be told without the engine's noise; `test_drawn_texts` looks at the noise.
"""

import json

import pytest
import torch

from retort.distill.losses import IGNORED
from retort.distill.presets import PRESETS
from retort.errors import ConfigurationError
from tests.distill import naive
from tests.distill.toys import ROWS, config, llama, tokenizer, trainer

END, LONGEST = 0, 8
WIDTH = 258


@torch.no_grad()
def predictions(model, prompt, completion):
    """Probabilities [n, V] of the completion's tokens, one forward for each."""
    ids = [*prompt, *completion]
    rows = [model(torch.tensor([ids[:t]])).logits[0, -1] for t in range(len(prompt), len(ids))]
    return torch.stack(rows).double()


@torch.no_grad()
def greedy(model, prompt, start=()):
    text = list(start)
    while len(text) < LONGEST and (not text or text[-1] != END):
        text.append(int(model(torch.tensor([[*prompt, *text]])).logits[0, -1].argmax()))
    return text


@torch.no_grad()
def interleaved(student, teacher, prompt, k):
    """SKD: the student's token where it is among the teacher's k likeliest, else the teacher's."""
    text = []
    while len(text) < LONGEST and (not text or text[-1] != END):
        ids = torch.tensor([[*prompt, *text]])
        token = int(student(ids).logits[0, -1].argmax())
        likeliest = teacher(ids).logits[0, -1].topk(k).indices.tolist()
        text.append(token if token in likeliest else likeliest[0])
    return text


def revised(student, teacher, prompt):
    """SCRG: the worst of the student's errors becomes the teacher's token, and it goes on."""
    text = greedy(student, prompt)
    ps, qs = (predictions(m, prompt, text).softmax(-1) for m in (teacher, student))
    kls = [float(naive.kl(p, q)) for p, q in zip(ps, qs, strict=True)]
    errors = [t for t, token in enumerate(text) if token != int(ps[t].argmax())]
    if not errors:
        return text
    worst = max(errors, key=lambda t: kls[t])
    return greedy(student, prompt, [*text[:worst], int(ps[worst].argmax())])


def with_divergence(name, **parameters):
    def loss(p, q, _):
        pairs = zip(p.softmax(-1), q.softmax(-1), strict=True)
        return [naive.divergence(name, a, b, **parameters) for a, b in pairs]

    return loss


def cross_entropy(_, q, completion):
    rows = q.softmax(-1)
    return [-rows[n, token].log() for n, token in enumerate(completion)]


def banded(p, q, completion):
    """DAC-KL with the band that an untrained sub-network opens."""
    low, high = -4 * 0.02, 1 + 4 * 0.02
    lower = low + (high - low) * torch.tensor(-6.0).sigmoid()
    upper = lower + (high - lower) * torch.tensor(6.0).sigmoid()
    rows = zip(p.softmax(-1), q.softmax(-1), completion, strict=True)
    return [naive.dac_token(a, b, token, 64, lower, upper)[0] for a, b, token in rows]


def threes(ids):
    """Spans of three tokens: random bytes have no phrases (how these are found: test_spans)."""
    return [place // 3 for place in range(len(ids))]


def spans(p, q, completion):
    """The distance of neighbours' joint predictions, both of one span."""
    p, q, tags = p.softmax(-1), q.softmax(-1), threes(completion)
    pairs = [t for t in range(len(tags) - 1) if tags[t] == tags[t + 1]]
    return [naive.span_pair(p[t], p[t + 1], q[t], q[t + 1], None, "l2") for t in pairs]


FORWARD = with_divergence("forward_kl")
JSD = with_divergence("jsd", beta=0.5)
SKEW = with_divergence("skew_forward_kl", alpha=0.1)
REVERSE = with_divergence("reverse_kl")
ALPHA_BETA = with_divergence("alpha_beta", alpha=0.2, beta=0.7)
REVERSE_SKEW = with_divergence("skew_reverse_kl", alpha=0.1)

PAPERS = {
    "sft": lambda s, t, x, y: [(y, cross_entropy, 1)],
    "seqkd": lambda s, t, x, y: [(greedy(t, x), cross_entropy, 1)],
    "kd": lambda s, t, x, y: [(y, FORWARD, 1)],
    "rkl": lambda s, t, x, y: [(greedy(s, x), REVERSE, 1)],
    "jsd": lambda s, t, x, y: [(y, JSD, 1)],
    "imitkd": lambda s, t, x, y: [((y, greedy(s, x)), FORWARD, 1)],
    "gkd": lambda s, t, x, y: [((y, greedy(s, x)), JSD, 1)],
    "distillm": lambda s, t, x, y: [(y, SKEW, 1)],
    "distillm at φ = 1": lambda s, t, x, y: [(greedy(s, x), SKEW, 1)],
    "distillm2": lambda s, t, x, y: [
        (greedy(t, x), SKEW, 0.5),
        (greedy(s, x), REVERSE_SKEW, 0.5),
    ],
    "abkd": lambda s, t, x, y: [(y, ALPHA_BETA, 1)],
    "skd": lambda s, t, x, y: [(interleaved(s, t, x, 25), FORWARD, 1)],
    "mgsr": lambda s, t, x, y: [(y, cross_entropy, 1), (revised(s, t, x), (banded, spans), 1)],
}


def step(run):
    """The sequences, the batch and the loss of the first step."""
    batch = next(iter(run.get_train_dataloader()))
    (sequences,) = run._sequences([batch["examples"]])
    built = run._batch(sequences)
    run._counts = run._global_counts([built])
    return batch["examples"], sequences, run.compute_loss(run.model, built).item()


def expected_loss(paper, run, examples, sequences):
    """The described loss of these rows; checks the sequences on the way."""
    student, teacher = run.model, run.teacher.model
    found, rest = {}, list(sequences)
    for example in examples:
        prompt = example.prompt_ids
        for text, loss, weight in paper(student, teacher, prompt, example.completion_ids):
            sequence = rest.pop(0)
            assert sequence.prompt == prompt
            assert sequence.completion in (text if isinstance(text, tuple) else [text])
            p, q = (predictions(m, prompt, sequence.completion) for m in (teacher, student))
            for each in loss if isinstance(loss, tuple) else (loss,):
                found.setdefault((each, weight), []).extend(each(p, q, sequence.completion))
    assert not rest
    return sum(weight * torch.stack(v).mean().item() for (_, weight), v in found.items())


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_is_its_paper(tmp_path, name):
    method = name.split()[0]
    changes = {"do_sample": False} if PRESETS[method].writes else {}
    models = (llama(n, dtype=torch.float64) for n in (2, 1))
    run = trainer(tmp_path, *models, method=method, per_device_train_batch_size=4, **changes)
    if method == "mgsr":
        run.objective.tagger = threes
    if "φ" in name:
        run.rollouts.sources.schedule.phi = 1.0
    examples, sequences, loss = step(run)
    assert expected_loss(PAPERS[name], run, examples, sequences) == pytest.approx(loss, rel=1e-6)


def test_every_preset_is_described():
    assert {name.split()[0] for name in PAPERS} == set(PRESETS)


def test_loss_trajectories_are_pairwise_distinct(tmp_path):
    """One toy batch, three steps; distillm's buffer and φ move on the way."""
    curves = {}
    for name in PRESETS:
        folder = tmp_path / name
        run = trainer(folder, method=name, per_device_train_batch_size=8, max_steps=3)
        run.rollouts.sources.schedule.phi = 0.9
        run.train()
        lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
        curves[name] = [line["loss"] for line in lines if "loss" in line]
    names = list(curves)
    for i, one in enumerate(names):
        for other in names[:i]:
            apart = [abs(a - b) for a, b in zip(curves[one], curves[other], strict=True)]
            assert min(apart) > 1e-6, (one, other)


@pytest.mark.parametrize("method", ["imitkd", "gkd"])
def test_half_of_the_sequences_are_the_students(tmp_path, method):
    run = trainer(tmp_path, method=method, per_device_train_batch_size=8)
    run.state.max_steps, sources = 64, []
    for number in range(24):
        run.state.global_step = number
        sources += [s.source for s in step(run)[1]]
    assert sources.count("student") / len(sources) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("method", ["rkl", "gkd", "skd", "distillm2"])
def test_drawn_texts_differ_from_step_to_step_and_not_from_run_to_run(tmp_path, method):
    def texts(number, **changes):
        run = trainer(tmp_path, method=method, per_device_train_batch_size=8, **changes)
        run.state.global_step = number
        return [s.completion for s in step(run)[1] if s.source == "student"]

    assert texts(0) == texts(0) != []
    assert texts(0) != texts(1)
    assert texts(0, do_sample=False) != texts(0)
    assert texts(0, seed=7) != texts(0)


def test_a_low_temperature_draws_the_likeliest_text(tmp_path):
    cold = trainer(tmp_path, method="rkl", rollout_temperature=1e-4)
    plain = trainer(tmp_path, method="rkl", do_sample=False)
    assert [s.completion for s in step(cold)[1]] == [s.completion for s in step(plain)[1]]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"method": "mgsr", "interleave_top_k": 5}, "scrg and interleave_top_k"),
        ({"method": "skd", "lmbda": 0}, "interleave_top_k"),
        ({"method": "distillm2", "lmbda": 0}, "contrast"),
        ({"method": "rkl", "completions": "teacher"}, "completions"),
        ({"method": "kd", "do_sample": True}, "do_sample"),
        ({"method": "sft", "replay_buffer_size": 9}, "replay_buffer_size"),
        ({"method": "gkd", "replay_share": 0.5}, "replay_buffer_size"),
        ({"method": "distillm", "eval_strategy": "no"}, "eval_strategy"),
        ({"method": "distillm", "replay_share": 0.5}, "replay_share"),
        ({"method": "distillm2", "lmbda": "adaptive", "eval_strategy": "epoch"}, "contrast"),
        ({"method": "gkd", "lmbda": "often"}, "lmbda"),
        ({"method": "gkd", "lmbda": "1.2"}, "lmbda"),
        ({"method": "gkd", "lmbda": "nan"}, "lmbda"),
        ({"method": "seqkd", "lmbda": 0.5}, "lmbda"),
        ({"method": "sft", "contrast": "jsd"}, "contrast"),
        ({"completions": "internet"}, "completions"),
        ({"contrast": "jsf"}, "contrast"),
        ({"interleave_top_k": -1}, "interleave_top_k"),
        ({"rollout_temperature": 0}, "rollout_temperature"),
    ],
)
def test_what_contradicts_a_preset_is_named_in_one_line(tmp_path, values, named):
    with pytest.raises(ConfigurationError, match=named) as caught:
        config(tmp_path, **values)
    assert "\n" not in str(caught.value)


def test_a_preset_may_be_turned_off_policy(tmp_path):
    recipe = config(tmp_path, method="gkd", lmbda=0).recipe
    assert (recipe.writes, recipe.divergence) == (False, "jsd")
    assert config(tmp_path, method="gkd", lmbda="0.25").recipe.lmbda == 0.25


@pytest.mark.parametrize("method", ["seqkd", "distillm2"])
def test_where_the_teacher_writes_rows_need_no_completion(tmp_path, method):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    run = trainer(tmp_path, method=method, rows=rows, max_steps=1)
    run.train()
    assert "teacher" in {s.source for s in step(run)[1]}


def test_teacher_text_ends_like_any_completion(tmp_path):
    """No target is padding, though the toys pad with their end token."""
    assert tokenizer().pad_token_id == END
    run = trainer(tmp_path, method="seqkd")
    _, sequences, _ = step(run)
    batch = run._batch(sequences)
    counted = (batch["targets"] != IGNORED).sum(1).tolist()
    assert counted == [len(s.completion) for s in sequences]
