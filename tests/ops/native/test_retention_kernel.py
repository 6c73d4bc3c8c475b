"""Ragged retention and its fold against the naive recurrence, and a row's bits in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from retort.errors import ConfigurationError
from retort.ops import reference
from retort.ops.native.retention import (
    RetentionRows,
    RetentionTables,
    fold_states,
    ragged_retention,
)
from retort.ops.retention import BlockDecay, log_decay

HEADS, NAN = 3, float("nan")
# key width, value width, L; the last is wider than one stripe
SIZES = [(6, 5, 4), (33, 18, 7), (64, 271, 16)]
# starts and counts of the rows: fresh, inside a block, at its edge, over several blocks, far on
ROWS = [(0, 1), (0, 23), (3, 1), (4, 9), (16, 2), (31, 8), (32, 40), (50, 1)]


class Problem:
    """Rows with random keys and values, and the states and pages that their cache would hold."""

    def __init__(self, sizes, rows=ROWS):
        self.dk, self.dv, self.length = sizes
        self.rows = rows
        self.decay = BlockDecay.of(log_decay(HEADS, torch.float32), self.length)
        self.tables = RetentionTables(self.decay, self.dk, self.dv)
        self.gamma = log_decay(HEADS, torch.float64).exp().tolist()
        self.whole = [self._tokens(i, start + n) for i, (start, n) in enumerate(rows)]
        shape = (HEADS, self.length)
        self.pages = [torch.full((2 * len(rows), *shape, d), NAN) for d in (self.dk, self.dv)]
        self.states = torch.full((len(rows), HEADS, self.dk, self.dv), NAN)
        self.index = {name: [] for name in ("states", "before", "current", "moved", "to")}
        for i, (start, n) in enumerate(rows):
            self._store(i, start, n)

    def _tokens(self, seed, n):
        g = torch.Generator().manual_seed(seed)
        return [torch.randn(n, HEADS, d, generator=g) for d in (self.dk, self.dk, self.dv)]

    def _store(self, i, start, n):
        """Pages poisoned beyond the row's end, and the state that its first token reads."""
        first, last = start // self.length, (start + n - 1) // self.length
        for page, block in ((2 * i, first - 1), (2 * i + 1, first)):
            lo, hi = max(block, 0) * self.length, min(start, (block + 1) * self.length)
            for tape, x in zip(self.pages, self.whole[i][1:], strict=True):
                tape[page, :, : max(hi - lo, 0)] = x[lo:hi].transpose(0, 1)
        if first >= 2:
            k, v = (x[: (first - 1) * self.length].double() for x in self.whole[i][1:])
            self.states[i] = reference.retention_state(k, v, self.gamma)
        self.index["states"].append(i if first >= 2 else -1)
        self.index["before"].append(2 * i if first >= 1 else -1)
        self.index["current"].append(2 * i + 1 if start % self.length else -1)
        self.index["moved"].append(i if last > first else -1)
        self.index["to"].append(last)

    def run(self, which):
        """Outputs of some rows, each ``[n, H, d_v]``, and the states that moved."""
        part = {name: tuple(values[i] for i in which) for name, values in self.index.items()}
        starts, counts = zip(*(self.rows[i] for i in which), strict=True)
        rows = RetentionRows(
            starts, counts, part["states"], part["before"], part["current"], part["moved"],
            part["to"],
        )  # fmt: skip
        new = [torch.cat([self.whole[i][j][self.rows[i][0] :] for i in which]) for j in range(3)]
        moved = torch.full_like(self.states, NAN)
        y = ragged_retention(*new, rows, self.tables, self.states, tuple(self.pages), moved)
        return y.split(counts), moved

    def naive(self, i):
        """Y of a row's new tokens in float64, the division by √S_n undone."""
        q, k, v = (x.double() for x in self.whole[i])
        start = self.rows[i][0]
        root = [[sum(g**j for j in range(n + 1)) ** 0.5 for g in self.gamma] for n in range(len(q))]
        o = reference.retention_sum(q, k, v, self.gamma)
        return (o * torch.tensor(root, dtype=o.dtype)[..., None])[start:]


@pytest.mark.parametrize("sizes", SIZES)
def test_retention_equals_the_naive_recurrence(isa, sizes):
    problem = Problem(sizes)
    outputs, moved = problem.run(range(len(ROWS)))
    scale = 8 * problem.dk**0.5
    for i, y in enumerate(outputs):
        torch.testing.assert_close(y.double() / scale, problem.naive(i) / scale, atol=2e-6, rtol=0)
        block = problem.index["to"][i]
        if problem.index["moved"][i] >= 0:
            k, v = (x[: max(block - 1, 0) * problem.length].double() for x in problem.whole[i][1:])
            want = reference.retention_state(k, v, problem.gamma)
            torch.testing.assert_close(moved[i].double(), want, atol=2e-5, rtol=1e-5)
    untouched = [i for i, at in enumerate(problem.index["moved"]) if at < 0]
    assert moved[untouched].isnan().all()


@pytest.mark.parametrize("sizes", SIZES)
def test_a_rows_bits_ignore_its_company_and_the_threads(isa, sizes):
    problem = Problem(sizes)
    together = problem.run(range(len(ROWS)))[0]
    turned = problem.run(range(len(ROWS) - 1, -1, -1))[0]
    for i, y in enumerate(together):
        assert torch.equal(problem.run([i])[0][0], y)
        assert torch.equal(turned[len(ROWS) - 1 - i], y)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(map(torch.equal, problem.run(range(len(ROWS)))[0], together))
    finally:
        torch.set_num_threads(before)


def test_a_tokens_bits_ignore_how_the_passes_were_cut(isa):
    sizes, end = (33, 18, 7), 40
    want = Problem(sizes, [(0, end)]).run([0])[0][0]
    problem = Problem(sizes, [(start, end - start) for start in range(7)])
    problem.whole = [Problem(sizes, [(0, end)]).whole[0]] * 7
    problem.index["states"] = [-1] * 7
    for i in range(7):
        problem._store(i, i, end - i)
    for i in range(1, 7):
        assert torch.equal(problem.run([i])[0][0], want[i:])


@pytest.mark.parametrize("sizes", SIZES)
def test_folding_equals_the_naive_state(isa, sizes):
    problem = Problem(sizes, [(2 * sizes[2], 1), (2 * sizes[2], 2)])
    length = problem.length
    states = torch.full((2, HEADS, problem.dk, problem.dv), NAN)
    whole = [[x[n * length : (n + 1) * length] for n in range(2)] for x in problem.whole[0][1:]]
    for n in range(2):
        pages = [x[n].transpose(0, 1).contiguous() for x in whole]
        both = ([page] * 2 for page in pages)
        fold_states(states.unbind(), *both, problem.tables, fresh=n == 0)
    k, v = (x[: 2 * length].double() for x in problem.whole[0][1:])
    want = reference.retention_state(k, v, problem.gamma)
    assert torch.equal(states[0], states[1])
    torch.testing.assert_close(states[0].double(), want, atol=2e-5, rtol=1e-5)


def test_no_rows(isa):
    problem = Problem(SIZES[0])
    nothing = RetentionRows((), (), (), (), (), (), ())
    empty = [torch.empty(0, HEADS, d) for d in (problem.dk, problem.dk, problem.dv)]
    pages = tuple(problem.pages)
    y = ragged_retention(*empty, nothing, problem.tables, problem.states, pages, problem.states)
    assert y.shape == (0, HEADS, problem.dv)


def test_bad_input_is_refused():
    problem = Problem(SIZES[0])
    q, k, v = problem.whole[7]
    new = [x[50:] for x in (q, k, v)]
    rows = RetentionRows((50,), (1,), (7,), (14,), (15,), (-1,), (13,))
    rest = problem.tables, problem.states, tuple(problem.pages), problem.states

    def call(rows=rows, new=new, rest=rest):
        return ragged_retention(*new, rows, *rest)

    assert call().isfinite().all()
    for bad in (
        lambda: call(new=[new[0].double(), *new[1:]]),
        lambda: call(new=[torch.randn(1, HEADS, 12)[..., ::2], *new[1:]]),
        lambda: call(new=[new[0][:, :2], *new[1:]]),
        lambda: call(rest=(*rest[:3], problem.states[..., :2])),
        lambda: call(rest=(*rest[:2], (problem.pages[0], problem.pages[1][:3]), rest[3])),
        *(
            lambda change=change: call(replace(rows, **change))
            for change in (
                {"states": (-1,)}, {"states": (99,)}, {"before": (-1,)}, {"current": (-1,)},
                {"current": (99,)}, {"counts": (0,)}, {"counts": (2,)}, {"starts": (-1,)},
                {"moved": (0,)}, {"moved": (99,), "moved_blocks": (13,)},
            )
        ),
        lambda: fold_states([problem.states[0]], [], [], problem.tables),
        lambda: fold_states([problem.states[0]], [q], [v], problem.tables),
        lambda: RetentionTables(BlockDecay.of(log_decay(2, torch.float64), 4), 6, 5),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            bad()
