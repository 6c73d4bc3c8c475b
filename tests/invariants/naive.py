"""Sampling options by their definitions, one token at a time, and the chi-square statistic."""

import torch

SHAPES = [
    {},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"logit_bias": {2: 3.0, 0: -100.0}},
    {"bad_words_ids": [[6], [3, 4], [2, 2]]},
    {"min_new_tokens": 2, "eos_token_id": 3},
    {"temperature": 1.4, "top_k": 5, "top_p": 0.9, "repetition_penalty": 0.8},
]


def naive_probs(logits, options, prompt, output):
    """Exact probabilities ``[vocab]`` of the next token."""
    scores = [float(x) for x in logits]
    for t, b in options.get("logit_bias", {}).items():
        scores[t] += b
    rep = options.get("repetition_penalty", 1.0)
    for t in set(prompt) | set(output):
        scores[t] = scores[t] * rep if scores[t] < 0 else scores[t] / rep
    for t in set(output):
        scores[t] -= options.get("presence_penalty", 0)
        scores[t] -= options.get("frequency_penalty", 0) * output.count(t)
    for t in _forbidden(options, prompt, output):
        scores[t] = -float("inf")
    scores = [s / options.get("temperature", 1.0) for s in scores]
    probs = torch.tensor(scores).double().softmax(-1)
    order = sorted(range(len(scores)), key=lambda t: -scores[t])
    kept = order[: options.get("top_k") or len(order)]
    probs = _only(probs, kept)
    mass, nucleus = 0.0, []
    for t in kept:
        if mass < options.get("top_p", 1.0):
            nucleus.append(t)
        mass += float(probs[t])
    probs = _only(probs, nucleus)
    least = options.get("min_p", 0.0) * float(probs.max())
    return _only(probs, [t for t in nucleus if float(probs[t]) >= least])


def _forbidden(options, prompt, output):
    text = [*prompt, *output]
    words = [w for w in options.get("bad_words_ids", []) if [*text, w[-1]][-len(w) :] == w]
    early = len(output) < options.get("min_new_tokens", 0)
    return [w[-1] for w in words] + ([options["eos_token_id"]] if early else [])


def _only(probs, kept):
    out = torch.zeros_like(probs)
    out[kept] = probs[kept]
    return out / out.sum()


def excess(counts, probs):
    """How many standard deviations χ² lies above its expectation (Wilson and Hilferty's cube).

    Outcomes expected less than 5 times are put together; impossible ones must not occur.
    """
    counts, probs = counts.flatten().double(), probs.flatten()
    if counts[probs <= 0].sum() > 0:
        return float("inf")
    want = probs * counts.sum()
    rare = want < 5
    got = torch.cat([counts[~rare], counts[rare].sum()[None]])
    want = torch.cat([want[~rare], want[rare].sum()[None]])
    got, want = got[want > 0], want[want > 0]
    freedom = len(want) - 1
    if freedom == 0:
        return 0.0
    statistic = float(((got - want) ** 2 / want).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5
