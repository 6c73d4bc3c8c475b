"""A dense state-space model as a plain Hugging Face model: go back in a row and go on.

python examples/dense_mamba.py
"""

import torch
from transformers import AutoModelForCausalLM

import retort


def main() -> None:
    config = retort.DenseMambaConfig(
        vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=3, dense_block_layers=2
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 64, (2, 9))
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    print("generated", out.shape)
    # A held row goes back to its third new token, which is replaced; no prompt is read again
    with retort.Engine(model, drafter="prompt-lookup", tape="completion") as engine:
        held = engine.add_request(ids[0].tolist(), greedy(6), hold=True)
        while engine.has_unfinished():
            engine.step()
        before = engine.request(held).output
        engine.rewind(held, length=ids.shape[1] + 3, append=[7], max_new_tokens=4)
        while engine.has_unfinished():
            engine.step()
        print("before", before, "after the correction", engine.request(held).output)


def greedy(new: int) -> retort.SamplingParams:
    return retort.SamplingParams(max_new_tokens=new, ignore_eos=True)


if __name__ == "__main__":
    main()
