"""The formulas of DESIGN's losses written out token by token in float64; imports nothing of retort.

A teacher signal is a dict: {"logits": [N, V]} (dense), or {"indices": [N, K], "log_probs": [N, K],
"log_tail": [N], "vocab": V} (top-k). A row's distribution is a plain vector over the shared width.
"""

import torch

IGNORED = -100


def teacher_rows(signal, width, temperature=1.0):
    """A list of probability vectors [width], the tail of a top-k signal spread evenly."""
    if "logits" in signal:
        return [torch.softmax(row[:width] / temperature, 0) for row in signal["logits"].double()]
    rows = []
    for ids, logs, tail in zip(
        signal["indices"], signal["log_probs"], signal["log_tail"], strict=True
    ):
        missing = signal["vocab"] - len(ids)
        p = torch.ones(signal["vocab"]).double() * tail.double().exp() / max(missing, 1)
        p[ids.long()] = logs.double().exp()
        p = p[:width] ** (1 / temperature)
        rows.append(p / p.sum())
    return rows


def student_rows(logits, width, temperature=1.0):
    return [torch.softmax(row[:width] / temperature, 0) for row in logits]


def outcome_rows(p, q, ids):
    """Probabilities of the ids one by one and of everything else, or unchanged without ids."""
    if ids is None:
        return p, q
    ids = [int(i) for i in ids if int(i) < len(p)]
    others = [i for i in range(len(p)) if i not in ids]
    return tuple(torch.stack([*(r[i] for i in ids), r[others].sum()]) for r in (p, q))


def kl(p, q):
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True) if a > 0)


def divergence(name, p, q, alpha=None, beta=None):
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skew_forward_kl":
        return kl(p, alpha * p + (1 - alpha) * q)
    if name == "skew_reverse_kl":
        return kl(q, alpha * q + (1 - alpha) * p)
    if name == "total_variation":
        return (p - q).abs().sum() / 2
    both = p**alpha * q**beta
    own = (alpha * p ** (alpha + beta) + beta * q ** (alpha + beta)) / (alpha + beta)
    return -(both - own).sum() / (alpha * beta)


def divergence_sum(name, signal, logits, targets, width, temperature=1.0, **parameters):
    total = logits.new_zeros(())
    ps, qs = teacher_rows(signal, width, temperature), student_rows(logits, width, temperature)
    for n, target in enumerate(targets.tolist()):
        if target != IGNORED:
            ids = signal["indices"][n] if "indices" in signal else None
            total = total + divergence(name, *outcome_rows(ps[n], qs[n], ids), **parameters)
    return total


def sft_sum(logits, targets):
    pairs = zip(logits, targets.tolist(), strict=True)
    return -sum(torch.softmax(row, 0)[t].log() for row, t in pairs if t != IGNORED)


def dac_token(p, q, target, k, lower, upper, tau=0.02, known=None):
    """(KL(P‖Q), coverage of the top-k's mass) of one token with the band (lower, upper).

    known: the ids of a top-k signal, the only ones that can be among the k.
    """
    candidates = range(len(p)) if known is None else [i for i in known.tolist() if i < len(p)]
    order = sorted(candidates, key=lambda i: -float(p[i]))[:k]
    slots = order + ([target] if 0 <= target < len(p) and target not in order else [])
    big_p, big_q, covered, before = [], [], 0.0, 0.0
    for i in slots:
        mid = before + p[i] / 2
        before = before + p[i]
        m = torch.sigmoid((upper - mid) / tau) * torch.sigmoid((mid - lower) / tau)
        m = torch.ones_like(m) if i == target else m
        covered = covered + (m * p[i] if i in order else 0)
        big_p.append(m * p[i])
        big_q.append(m * q[i])
    big_p, big_q = torch.stack(big_p), torch.stack(big_q)
    tails = 1 - big_p.sum(), 1 - big_q.sum()
    value = kl(torch.cat([big_p, tails[0][None]]), torch.cat([big_q, tails[1][None]]))
    return value, covered / p[order].sum() if order else torch.ones(()).double()


def span_pair(p, p_next, q, q_next, ids, distance):
    """Distance of one pair's correlations; ids: the union for a top-k signal, else None."""
    a, b = p * p_next, q * q_next
    if ids is not None:
        ids = sorted({int(i) for i in ids if int(i) < len(p)})
        rest = [(1 - x[ids].sum()) * (1 - y[ids].sum()) for x, y in ((p, p_next), (q, q_next))]
        a, b = torch.cat([a[ids], rest[0][None]]), torch.cat([b[ids], rest[1][None]])
    if distance == "l2":
        return ((a - b) ** 2).sum()
    if distance == "sqrt_l1":
        return (a.sqrt() - b.sqrt()).abs().sum()
    return kl(a / a.sum(), b / b.sum())


def span_sum(signal, logits, pairs, width, distance, temperature=1.0):
    total = logits.new_zeros(())
    ps, qs = teacher_rows(signal, width, temperature), student_rows(logits, width, temperature)
    for n, wanted in enumerate(pairs.tolist()):
        if wanted and n + 1 < len(pairs):
            ids = None
            if "indices" in signal:
                ids = [*signal["indices"][n].tolist(), *signal["indices"][n + 1].tolist()]
            total = total + span_pair(ps[n], ps[n + 1], qs[n], qs[n + 1], ids, distance)
    return total
