"""What transformers' common model and generation tests check, on both models and every m."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import retort  # noqa: F401  registers with the Auto classes and with PEFT
from retort.errors import ConfigurationError
from tests.models import mambas, retnets

VOCAB = retnets.VOCAB
MAKERS = {
    "RetNet": (retnets.tiny, {"dense_block_layers": 0}),
    "RetNet with norms": (retnets.tiny, {"dense_block_layers": 0, "dense_norms": True}),
    "DenseRetNet m=1": (retnets.tiny, {"dense_block_layers": 1}),
    "DenseRetNet m=2": (retnets.tiny, {}),
    "DenseRetNet m=4": (retnets.tiny, {"dense_block_layers": 4}),
    "DenseRetNet without gate": (retnets.tiny, {"dense_gate": False}),
    "Mamba": (mambas.tiny, {"dense_block_layers": 0}),
    "DenseMamba m=1": (mambas.tiny, {"dense_block_layers": 1}),
    "DenseMamba m=2": (mambas.tiny, {}),
    "DenseMamba m=4": (mambas.tiny, {"dense_block_layers": 4}),
    "DenseMamba without gate": (mambas.tiny, {"dense_gate": False}),
}


def ids(*shape, seed=1):
    return retnets.ids(*shape, seed=seed)


def close(got, want, atol=1e-10):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.fixture(params=MAKERS)
def make(request):
    """A maker of one variant; keywords change its configuration."""
    maker, changes = MAKERS[request.param]
    return lambda **more: maker(**(changes | more))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_save_and_load(make, tied, shard, tmp_path):
    model, tokens = make(tie_word_embeddings=tied), ids(2, 12)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(make, device_map, tmp_path):
    model, tokens = make(), ids(2, 12)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    want = model.generate(tokens, max_new_tokens=6, pad_token_id=0)
    if loaded.device.type == "cpu":
        assert torch.equal(loaded.generate(tokens, max_new_tokens=6, pad_token_id=0), want)


@torch.no_grad()
def test_layers_offloaded_to_disk_give_the_same_logits(make, tmp_path):
    """accelerate's hooks move weights and inputs around each layer."""
    model, tokens = make(), ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    base = model.base_model_prefix
    places = {name: "cpu" for name, _ in getattr(model, base).named_children()}
    places = {f"{base}.{name}": place for name, place in places.items()}
    places.pop(f"{base}.layers")
    places |= {f"{base}.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path / "off"
    )
    for use_cache in (False, True):
        want = model(tokens, use_cache=use_cache).logits
        close(loaded(tokens, use_cache=use_cache).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_the_old_tokens(make, tied):
    model, tokens = make(tie_word_embeddings=tied), ids(2, 12)
    want = model(tokens).logits
    for size in (VOCAB + 5, VOCAB):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        got = model(tokens).logits
        assert got.shape[-1] == size
        close(got[..., :VOCAB], want)
    model.resize_token_embeddings(VOCAB - 4)
    assert model(tokens.clamp_max(VOCAB - 5)).logits.shape[-1] == VOCAB - 4


def test_a_new_model_guesses_and_its_loss_shifts_labels(make):
    """From scratch the loss is that of a guess; label t is predicted at t − 1."""
    changes = {"initializer_range": 0.02, "vocab_size": 500, "hidden_size": 32}
    made = make(dtype=torch.float32)
    torch.manual_seed(0)
    model = type(made)(type(made.config)(**(made.config.to_dict() | changes)))
    tokens = torch.randint(500, (2, 20))
    labels = tokens.clone()
    labels[0, :7] = -100
    output = model(tokens, labels=labels)
    close(output.loss, torch.tensor(500.0).log(), 0.7)
    want = cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(output.loss.detach(), want.detach(), 1e-5)


@torch.no_grad()
def test_rows_of_a_batch_are_rows_alone(make):
    model, tokens = make(), ids(4, 15)
    mask = torch.ones(4, 15, dtype=torch.long)
    mask[0, :6], mask[1, 11:], mask[2, 3:5] = 0, 0, 0
    batch = model(tokens, attention_mask=mask).logits
    for b in range(4):
        row = tokens[b : b + 1, mask[b] == 1]
        close(batch[b, mask[b] == 1], model(row).logits[0])
    noise = torch.where(mask == 1, tokens, ids(4, 15, seed=9))
    again = model(noise, attention_mask=mask).logits
    assert torch.equal(again[mask == 1], batch[mask == 1])


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_from_ids_and_embeddings_with_and_without_cache(make, beams):
    model, tokens = make(), ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    how = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, "num_beams": beams}
    want = model.generate(tokens, use_cache=False, **how)
    assert torch.equal(model.generate(tokens, use_cache=True, **how), want)
    embeds = model.get_input_embeddings()(tokens)
    got = model.generate(inputs_embeds=embeds, use_cache=True, **how)
    assert torch.equal(got, want[:, 10:])
    alone = model.generate(tokens[:1, 4:], **(how | {"attention_mask": None}))
    assert torch.equal(alone[0, 6:], want[0, 10:])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_states_in_float32(make, dtype):
    model, tokens = make(), ids(2, 30)
    want = model(tokens).logits
    half = copy.deepcopy(model).to(dtype)
    output = half(tokens[:, :20], use_cache=True)
    cache = output.past_key_values
    more = half(tokens[:, 20:], past_key_values=cache)
    got = torch.cat([output.logits, more.logits], 1)
    assert got.dtype == dtype and cache.states.dtype == cache.tape.keys.dtype == torch.float32
    assert (got.double() - want).abs().mean() < 0.15 * want.std()
    close(got.double(), half(tokens, use_cache=False).logits.double(), 0.2 * float(want.std()))


def test_gradient_checkpointing_and_logits_to_keep(make):
    tokens, grads = ids(2, 20), []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        whole = model(tokens).logits
        kept = model(tokens, logits_to_keep=4).logits
        close(kept, whole[:, -4:], 1e-12)
        kept.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(*grads, 1e-9)


def test_trainer_takes_ten_steps_and_saves(make, tmp_path):
    model = make(dtype=torch.float32, initializer_range=0.1)
    rows = [{"input_ids": t, "labels": t} for t in ids(1, 12).repeat(40, 1)]
    args = TrainingArguments(
        tmp_path, max_steps=10, learning_rate=1e-2, report_to="none", logging_steps=1,
        per_device_train_batch_size=4, save_strategy="no", use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model()
    loaded, tokens = AutoModelForCausalLM.from_pretrained(tmp_path), ids(1, 5)
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def test_lora_knows_what_to_adapt(make, tmp_path):
    peft = pytest.importorskip("peft")
    model, tokens = make(), ids(2, 9)
    want = model(tokens).logits.detach()
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM"))
    close(adapted(tokens).logits.detach(), want, 1e-12)
    adapted(tokens, labels=tokens).loss.backward()
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    each = 4 if model.config.model_type == "dense_retnet" else 3
    assert len(adapters) == 3 * each and all(p.grad.any() for p in adapters.values())
    with torch.no_grad():
        for weight in adapters.values():
            weight += 0.1 * torch.randn_like(weight)
    got = adapted(tokens).logits.detach()
    assert (got - want).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    close(again(tokens).logits.detach(), got, 1e-6)
    close(adapted.merge_and_unload()(tokens).logits.detach(), got, 1e-9)


def test_an_adapter_that_would_do_nothing_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(mambas.tiny(), peft.LoraConfig(r=32, target_modules=["conv1d"]))
    with pytest.raises(ConfigurationError, match="conv1d is wrapped"):
        model(ids(1, 5))
