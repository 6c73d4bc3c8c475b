"""FAULTS D19: speculation never changes a greedy token, in any cell of the table."""

import pytest

from tests.invariants.losslessness import (
    AXES,
    MODELS,
    Cell,
    _pairs,
    every_cell,
    pairwise,
    run,
)

CELLS = pairwise()


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_equals_the_reference(cell):
    record = run(cell)
    assert record["equal"], record
    assert record["sound"], record


@pytest.mark.parametrize("name", MODELS)
def test_single_precision_on_pytorchs_arithmetic(name):
    """In the table above float32 runs on the native core wherever that is built."""
    cell = Cell(name, "float32", 3, 4, "random")
    record = run(cell, cpu_backend="torch")
    assert record["backend"] == "torch"
    assert record["equal"] and record["sound"], record


@pytest.mark.slow
@pytest.mark.parametrize("cell", every_cell(), ids=str)
def test_every_cell_equals_the_reference(cell):
    test_a_cell_equals_the_reference(cell)


def test_the_pairwise_cells_cover_every_pair():
    rows = [(c.model, c.dtype, c.batch, c.k, c.pattern) for c in CELLS]
    covered = set().union(*(_pairs(row) for row in rows))
    everything = set().union(
        *(_pairs((c.model, c.dtype, c.batch, c.k, c.pattern)) for c in every_cell())
    )
    assert covered == everything
    assert len(CELLS) < len(every_cell()) / 8 and len(AXES) == 5


def test_a_wrong_token_is_seen(monkeypatch):
    """The table itself can fail: accept a wrong draft, and cells differ."""
    import retort.decode.verify as verify_module

    take = verify_module._Row.take

    def trusting(row, token):
        take(row, token if row.guess is None else row.guess)

    monkeypatch.setattr(verify_module._Row, "take", trusting)
    assert not run(Cell("llama", "float64", 3, 4, "random"))["equal"]
