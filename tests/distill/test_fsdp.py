"""A student sharded by FSDP2 learns as an unsharded one, and writes with a whole copy."""

import pytest
import torch

from retort.distill import sharding
from retort.distill.sharding import RolloutCopy
from retort.errors import ConfigurationError
from tests.distill.test_ddp import launch
from tests.distill.toys import llama


@pytest.mark.parametrize("mode", ["keep", "reshard", "lora"])
def test_a_sharded_step_is_the_unsharded_one_and_decoding_communicates_nothing(tmp_path, mode):
    done = launch("tests.distill.fsdp_worker", tmp_path, mode)
    assert done.stdout.count("is done") == 2


def test_a_copy_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    student = llama(2, tie_word_embeddings=True)
    bytes_needed = sum(p.numel() * 4 for p in student.parameters())
    monkeypatch.setattr(sharding, "free_memory", lambda _: bytes_needed - 1)
    with pytest.raises(ConfigurationError, match=r"needs 0\.00 GB on cpu .*lmbda=0"):
        RolloutCopy(student)
    monkeypatch.setattr(sharding, "free_memory", lambda _: 2 * bytes_needed)
    copied = RolloutCopy(student).model
    assert copied is not student and torch.equal(copied.lm_head.weight, student.lm_head.weight)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight


def test_a_big_copys_size_is_named(monkeypatch):
    monkeypatch.setattr(sharding, "size", lambda _: 14_000_000_000)
    monkeypatch.setattr(sharding, "free_memory", lambda _: 3_000_000_000)
    with pytest.raises(ConfigurationError, match=r"needs 14\.00 GB on cpu and 3\.00 GB are free"):
        RolloutCopy(llama(2))
