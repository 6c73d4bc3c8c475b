"""A Llama checkpoint as a GGUF in float32, for llama.cpp as an arm of ``retort bench decode``.

    python bench/peers/to_gguf.py smollm2-135m-instruct smollm2-135m-f32.gguf

The benchmark feeds token ids, so the file has no tokenizer: the vocabulary's size and the token
that ends a text are all that it says.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from retort.errors import ConfigurationError
from retort.models import zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="zoo name, hub id or folder")
    parser.add_argument("file", type=Path)
    told = parser.parse_args()
    write(zoo.load_model(told.model, dtype="float32"), told.file)


def write(model: Any, file: Path) -> None:
    """The model's settings and weights as one file."""
    writer = gguf.GGUFWriter(file, "llama")
    describe(writer, model.config)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_eos_token_id(end_of_sequence(model))
    for name, weight in tensors(model):
        writer.add_tensor(name, weight.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: gguf.GGUFWriter, config: Any) -> None:
    """The sizes, under llama.cpp's names."""
    rope = config.rope_parameters
    if config.model_type != "llama" or rope["rope_type"] != "default":
        raise ConfigurationError(
            f"{config.model_type} with {rope['rope_type']} rotary angles: only Llama's default ones"
        )
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def end_of_sequence(model: Any) -> int:
    """The one token that ends a text; the file has room for no second one."""
    ends = model.generation_config.eos_token_id
    if not isinstance(ends, int):
        raise ConfigurationError(f"the model's end-of-sequence tokens are {ends}: it must have one")
    return ends


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights under llama.cpp's names; where the output layer is tied, it takes the embedding."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer = name.split(".")[-2]
        if layer in heads:
            weight = in_pairs(weight, heads[layer])
        yield names.get_name(name, (".weight", ".bias")), weight


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Output rows so that the two that rotate together are neighbours.

    transformers rotates row i of a head with row i + d/2, llama.cpp row 2i with row 2i + 1.
    """
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).transpose(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    main()
