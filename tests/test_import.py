"""``import retort`` is light, and its classes are found by the Auto classes in any order."""

import pytest

import retort
from retort import registry

USE = """
import json
config = AutoConfig.for_model("dense_retnet")
from transformers import AutoModel, AutoModelForCausalLM
assert type(config).__name__ == "DenseRetNetConfig", type(config)
small = type(config)(vocab_size=16, hidden_size=64, query_key_dim=8, num_attention_heads=2,
                     num_hidden_layers=1)
names = [type(auto.from_config(small)).__name__ for auto in (AutoModel, AutoModelForCausalLM)]
assert names == ["DenseRetNetModel", "DenseRetNetForCausalLM"], names
"""

ORDERS = {
    "retort first": "import retort; from transformers import AutoConfig",
    "transformers first": "from transformers import AutoConfig; import retort",
    "auto models first": "import transformers.models.auto.modeling_auto, retort\n"
    "from transformers import AutoConfig",
    "our classes first": "from retort import DenseRetNetConfig\n"
    "from transformers import AutoConfig",
    # transformers loads its Auto classes in the middle of these two modules.
    "in the middle of modeling_utils": "import retort, transformers.modeling_utils\n"
    "from transformers import AutoConfig",
    "in the middle of the trainer": "import retort\nfrom transformers import Trainer, AutoConfig",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_find_ours_in_any_import_order(python, order):
    python(ORDERS[order] + "\n" + USE)


def test_published_checkpoints_load_by_their_own_model_type(python):
    code = """
import retort
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("DenseGauRetNet", vocab_size=16, hidden_size=64, query_key_dim=8,
                              num_attention_heads=2, num_hidden_layers=1)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    assert python(code).strip() == "DenseGauRetNetForCausalLM"


def test_import_loads_neither_torch_nor_transformers(python):
    code = "import retort, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_import_takes_less_than_a_second(python, cpu_seconds):
    assert cpu_seconds(lambda: python("import retort")) < 1


def test_public_names_load_on_first_use():
    for name in retort.__all__:
        assert getattr(retort, name) is not None
        assert name in dir(retort)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = retort.no_such_name


def test_registry_lists_only_classes_that_exist():
    import importlib

    for architecture in registry.ARCHITECTURES:
        module = importlib.import_module(architecture.module)
        assert getattr(module, architecture.config).model_type == architecture.model_type
        assert hasattr(module, architecture.causal_lm)
        assert architecture.model is None or hasattr(module, architecture.model)
