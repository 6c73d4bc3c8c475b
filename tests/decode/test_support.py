"""What a packed pass would compute wrongly is refused before loading, and again in the pass."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from retort.decode import packed
from retort.decode.engine import Engine
from retort.decode.packed import PackedModel
from retort.decode.support import check_supported
from retort.errors import UnsupportedModelError
from tests.decode.sweep import ENCODERS, config_of
from tests.decode.toys import prompts, reference

AHEAD = "its attention looks ahead"
OTHER_KEYS = "reads keys or values other than those in the cache"
REFUSED = {
    **dict.fromkeys(ENCODERS, AHEAD),
    "phimoe": r"shows a token 5 keys, while attention is told window=None",
    "jetmoe": f"tried without weights, fails|{OTHER_KEYS}",
    "diffllama": OTHER_KEYS,
    "deepseek_v3": OTHER_KEYS,
    "doge": "makes a mask of its own",
    "hrm_text": r"tried without weights, fails \(AttributeError: .*is_initialized",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_go_wrong_is_refused_by_its_feature(name):
    with pytest.raises(UnsupportedModelError, match=f"^{name}: .*({REFUSED[name]}).*own generate"):
        check_supported(config_of(name))


@pytest.mark.parametrize("name", ["phimoe", "bert"])
def test_no_weight_is_made_and_nobody_is_asked_for_a_refusal(name, tmp_path, monkeypatch):
    config_of(name).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    monkeypatch.setattr("retort.models.loader.load_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("network"))
    monkeypatch.setattr(torch.Tensor, "normal_", _only_on_meta(torch.Tensor.normal_))
    with pytest.raises(UnsupportedModelError, match=name):
        Engine.from_pretrained(str(tmp_path))


def _only_on_meta(method):
    def checked(tensor, *args, **options):
        assert tensor.is_meta
        return method(tensor, *args, **options)

    return checked


def test_a_window_is_fine_where_attention_is_told():
    for name in ("mistral", "gemma2", "gpt_oss"):
        check_supported(config_of(name, sliding_window=5))
    check_supported(config_of("phimoe", sliding_window=None))


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
def test_a_forward_that_looks_at_positions_can_be_probed(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    rope["original_max_position_embeddings"] = 64
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    check_supported(config_of("llama", rope_parameters=rope))


def test_an_encoder_set_up_as_a_decoder_equals_generate():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("bert", is_decoder=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.eos_token_id = None
    texts = [[t % 60 for t in p] for p in prompts((5, 2, 7))]
    expected = [reference(model, p, max_new_tokens=12) for p in texts]
    with Engine(model, drafter="prompt-lookup", draft_budget=4) as engine:
        outputs = engine.generate(texts, max_new_tokens=12, ignore_eos=True)
    assert [o.token_ids for o in outputs] == expected


@pytest.mark.parametrize("name", ["jetmoe", "diffllama", "doge", "bert"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_the_pass_itself_refuses_too(name, backend, monkeypatch):
    """Where a model changes after it was checked, e.g. by somebody's patch."""
    monkeypatch.setattr(packed, "check_supported", lambda *_: None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name)).eval().float()
    target = PackedModel(model, cpu_backend=backend)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        target.forward([(target.add_row(), [5, 6, 7])], [1])
    target.close()


def test_a_configuration_that_builds_nothing_is_refused():
    config = AutoConfig.for_model("llama", hidden_act="nothing that is known")
    with pytest.raises(UnsupportedModelError, match="cannot be built from its configuration"):
        check_supported(config)
