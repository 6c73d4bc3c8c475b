"""What each of two processes checks with a student sharded by FSDP2 on a gloo mesh."""

import copy
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from retort.distill.batch import TrainingSequence, build_batch
from retort.distill.hidden import HeadlessModel
from retort.distill.objective import Objective
from retort.distill.sequences.writers import StudentWriter, WritingSettings
from retort.distill.sharding import RolloutCopy, is_sharded, whole
from retort.distill.teachers import Teacher
from tests.distill.ddp_worker import adapted
from tests.distill.toys import config, llama, tokenizer

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [20], [31, 32]]
COMPLETIONS = [[8, 9, 0], [14, 15, 16, 17, 0], [21, 22, 0], [33, 34, 35, 36, 37, 0]]
WRITING = WritingSettings((0,), max_completion_length=6, max_length=32)


def sequences(rows):
    made = []
    for row in rows:
        made.append(TrainingSequence(PROMPTS[row], COMPLETIONS[row], True, False))
        made.append(TrainingSequence(PROMPTS[row], COMPLETIONS[row], False, True))
    return made


def step(objective, student, teacher, rows, counts, scale, optimizer, through=None):
    """One optimiser step of mgsr's losses on ``rows``."""
    batch = build_batch(sequences(rows), 0, objective.tagger)
    sums = objective.sums(student, teacher, batch, through=through)
    (objective.combine(sums, counts) * scale).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(model, mode):
    """Names of the parameters that learn."""
    return {n for n, _ in model.named_parameters() if mode != "lora" or "lora_" in n}


def main(folder, mode):
    reshard = mode == "reshard"
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    settings = config(folder, method="mgsr", dac_mode="fixed", loss_chunk_size=3)
    plain, teacher = llama(2, dtype=torch.float64), Teacher(llama(1, dtype=torch.float64))
    if mode == "lora":
        plain = adapted(plain).get_base_model()
    sharded = copy.deepcopy(plain)
    rollout = RolloutCopy(sharded)
    student = HeadlessModel(sharded)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=reshard)
    assert is_sharded(sharded) and not is_sharded(plain)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    assert all(p.to_local().shape[0] < p.shape[0] for p in sharded.parameters())
    assert {n for n, p in sharded.named_parameters() if p.requires_grad} == trained(sharded, mode)

    objective = Objective(settings, tokenizer())
    everything = range(len(PROMPTS))
    counts = objective.counts(build_batch(sequences(everything), 0, objective.tagger))
    mine = [[0], [1, 2, 3]][rank]  # the processes have unequal work
    ours = torch.optim.AdamW(sharded.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for _ in range(2):
        step(objective, student, teacher, mine, counts, 2, ours, sharded)
        step(objective, HeadlessModel(plain), teacher, everything, counts, 1, theirs)
    expected = dict(plain.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor), name
        torch.testing.assert_close(whole(parameter), expected[name], rtol=1e-9, atol=1e-11)
        assert torch.equal(expected[name], before[name]) != parameter.requires_grad, name

    calls, gather = [], DTensor.full_tensor
    DTensor.full_tensor = lambda tensor, **keywords: calls.append(1) or gather(tensor, **keywords)
    rollout.refresh(sharded)
    assert len(calls) == len(expected)  # each weight once

    dist.destroy_process_group()  # any collective call from here on is an error
    prompts = PROMPTS[: 1 + 3 * rank]  # one writes more than the other
    found = StudentWriter(rollout.model, teacher.model, WRITING).write(prompts, True)
    expected = StudentWriter(plain, teacher.model, WRITING).write(prompts, True)
    assert [t.tokens for t in found.texts] == [t.tokens for t in expected.texts]
    print(f"process {rank} is done")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
