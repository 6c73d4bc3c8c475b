"""Unpadded batch speculation inside transformers' `generate`, with a logits processor of yours.

python examples/in_transformers.py [MODEL]
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import retort
from retort.models import zoo


class NoDigits(LogitsProcessor):
    """Forbids the digits 0 to 9 as tokens."""

    def __init__(self, tokenizer: Any) -> None:
        ids = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
        self.ids = [i for i in ids if i is not None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(-1, torch.tensor(self.ids), -torch.inf)


def main(name: str = "smollm2-135m-instruct") -> None:
    folder = zoo.resolve(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = ["Water boils at", "The year after the year before the war was"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 16, "do_sample": False, "logits_processor": [NoDigits(tokenizer)]}
    speculate = retort.speculative(drafter="prompt-lookup")
    ours = model.generate(**inputs, **options, custom_generate=speculate)
    theirs = model.generate(**inputs, **options)
    print(*tokenizer.batch_decode(ours, skip_special_tokens=True), sep="\n")
    width = min(ours.shape[1], theirs.shape[1])
    print("equal:", torch.equal(ours[:, :width], theirs[:, :width]))


if __name__ == "__main__":
    main(*sys.argv[1:])
