"""llama.cpp as an arm of ``retort bench decode``, in its own Python with llama-cpp-python.

    python llama_cpp_decode.py FILE.gguf THREADS plain|lookup

Reads a line ``{"prompts": [[ids]], "max_new_tokens": n}`` and answers a line with token ids and
times, until its input ends. ``plain`` decodes all prompts together, a sequence each; ``lookup`` is
llama-cpp-python's own prompt lookup, which takes one prompt at a time. Greedy; rows stop at the
end-of-sequence token that the file names. Decoding time is a whole call less a call for one token.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

Tokens = list[list[int]]
Entry = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted
BATCH, MICRO_BATCH = 2048, 512  # tokens a call and a pass: llama.cpp's defaults
DRAFTS = {"max_ngram_size": 2, "num_pred_tokens": 2}  # what its README advises for CPUs


def main() -> None:
    """Answer requests until the input ends."""
    path, threads, mode = sys.argv[1:]
    llama_cpp._logger.set_verbose(False)  # errors only
    kind: type[Together] | type[Lookup] = Lookup if mode == "lookup" else Together
    peer = kind(path, int(threads))
    print(json.dumps(settings(peer)), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(peer, **json.loads(line))), flush=True)


def settings(peer: Together | Lookup) -> dict[str, Any]:
    """Versions and all that was chosen, for the record."""
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
        "key_value_cache": "f32",
        "flash_attn": False,  # llama-cpp-python's default
        "n_batch": BATCH,
        "n_ubatch": MICRO_BATCH,
        "threads": peer.threads,
        **peer.told,
    }


def measure(peer: Together | Lookup, prompts: Tokens, max_new_tokens: int) -> dict[str, Any]:
    """What `retort.evaluate.decoding.Measurement` wants to know."""
    peer.reserve(len(prompts), max(map(len, prompts)) + max_new_tokens)
    first = timed(peer, prompts, 1)[1]
    ids, total = timed(peer, prompts, max_new_tokens)
    tokens = sum(map(len, ids)) - len(ids)
    return {"token_ids": ids, "tokens": tokens, "seconds": total - first, "total_seconds": total}


def timed(peer: Together | Lookup, prompts: Tokens, new: int) -> tuple[Tokens, float]:
    """Token ids and seconds of one call."""
    started = time.perf_counter()
    ids = peer.generate(prompts, new)
    return ids, time.perf_counter() - started


class Together:
    """All prompts in one context, a sequence each, through llama.cpp's batches."""

    def __init__(self, path: str, threads: int) -> None:
        self.threads = threads
        self.told = {"mode": "llama_decode on all sequences", "kv_unified": False}
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.stop = end_of_sequence(self.model)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.context: Any = None
        self.places = (0, 0)

    def reserve(self, sequences: int, length: int) -> None:
        """A context in which so many sequences have so many places each; kept while it fits."""
        if self.places[0] == sequences and length <= self.places[1]:
            return
        if self.context:
            llama_cpp.llama_free(self.context)
        options = llama_cpp.llama_context_default_params()
        chosen = {
            "n_ctx": sequences * rounded(length),
            "n_seq_max": sequences,
            "n_batch": BATCH,
            "n_ubatch": MICRO_BATCH,
            "n_threads": self.threads,
            "n_threads_batch": self.threads,
            "flash_attn_type": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            "type_k": llama_cpp.GGML_TYPE_F32,
            "type_v": llama_cpp.GGML_TYPE_F32,
            "kv_unified": False,  # every sequence attends to its own places only
        }
        for name, value in chosen.items():
            setattr(options, name, value)
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp has no room for {sequences} sequences of {length} tokens")
        self.places = sequences, rounded(length)

    def generate(self, prompts: Tokens, new: int) -> Tokens:
        """Greedy tokens of all prompts; a row that ends leaves the batch."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        rows: Tokens = [[] for _ in prompts]
        entries = [e for i, prompt in enumerate(prompts) for e in prompt_entries(i, prompt)]
        while entries:
            for i, token in self._decode(entries):
                rows[i].append(token)
            entries = [
                (row[-1], len(prompts[i]) + len(row) - 1, i, True)
                for i, row in enumerate(rows)
                if len(row) < new and row[-1] != self.stop
            ]
        return rows

    def _decode(self, entries: list[Entry]) -> Iterator[tuple[int, int]]:
        """The sequence and the most likely next token of each entry that wants logits."""
        for start in range(0, len(entries), BATCH):
            part = entries[start : start + BATCH]
            self._fill(part)
            if llama_cpp.llama_decode(self.context, self.batch):
                raise SystemExit("llama_decode failed")
            wanted = [sequence for *_, sequence, logits in part if logits]
            if wanted:
                shape = (len(wanted), self.vocabulary)
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape)
                yield from zip(wanted, logits.argmax(axis=1).tolist(), strict=True)

    def _fill(self, entries: list[Entry]) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, logits) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence


class Lookup:
    """llama-cpp-python's `Llama` with its prompt lookup as the draft model."""

    def __init__(self, path: str, threads: int) -> None:
        self.path, self.threads = path, threads
        self.told = {"mode": "Llama.generate, a prompt at a time", **DRAFTS}
        self.length = 0
        self.reserve(1, 1)

    def reserve(self, sequences: int, length: int) -> None:
        """A context for one sequence of ``length``; kept while it fits."""
        if length <= self.length:
            return
        self.length = rounded(length)
        self.llama = llama_cpp.Llama(
            self.path,
            n_ctx=self.length,
            n_batch=BATCH,
            n_ubatch=MICRO_BATCH,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            flash_attn=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            logits_all=True,  # with a draft model it needs them, and room for them
            draft_model=LlamaPromptLookupDecoding(**DRAFTS),
            verbose=False,
        )
        self.stop = end_of_sequence(self.llama.model)

    def generate(self, prompts: Tokens, new: int) -> Tokens:
        """Greedy tokens, one prompt after the other."""
        return [self._row(prompt, new) for prompt in prompts]

    def _row(self, prompt: list[int], new: int) -> list[int]:
        self.llama.reset()  # else it would find the last call's prompt in its cache
        row: list[int] = []
        for token in islice(self.llama.generate(prompt, temp=0.0), new):
            row.append(token)
            if token == self.stop:
                break
        return row


def end_of_sequence(model: Any) -> int | None:
    """From the file's keys: a file without a tokenizer has it too."""
    key, text = b"tokenizer.ggml.eos_token_id", ctypes.create_string_buffer(32)
    known = llama_cpp.llama_model_meta_val_str(model, key, text, len(text)) > 0
    return int(text.value) if known else None


def prompt_entries(sequence: int, prompt: list[int]) -> list[Entry]:
    """A prompt's tokens; only the last one's logits are wanted."""
    last = len(prompt) - 1
    return [(token, i, sequence, i == last) for i, token in enumerate(prompt)]


def rounded(length: int) -> int:
    """llama.cpp's caches come in steps of 256 places."""
    return -(-length // 256) * 256


if __name__ == "__main__":
    main()
