"""Many prompts at once, with prompt lookup; text appears as soon as it is certain.

python examples/generate.py [MODEL]
"""

import sys

import retort

PROMPTS = [
    "One two three, one two three, one two",
    [{"role": "user", "content": "Repeat after me: the quick brown fox jumps over the lazy dog."}],
]


def main(model: str = "smollm2-135m-instruct") -> None:
    with retort.Engine.from_pretrained(model, drafter="prompt-lookup") as engine:
        for chunk in engine.stream(PROMPTS, max_new_tokens=24):
            print(f"row {chunk.index}: {chunk.text!r} {chunk.finish_reason or ''}")
        # Sampling is lossless too: a seed gives the same text with drafts and without
        options = {"do_sample": True, "temperature": 0.8, "seed": 7, "max_new_tokens": 24}
        fast = engine.generate(PROMPTS, **options)
    with retort.Engine.from_pretrained(model) as plain:
        slow = plain.generate(PROMPTS, **options)
    print("sampled texts are equal:", [o.text for o in fast] == [o.text for o in slow])
    print(fast[0].stats)


if __name__ == "__main__":
    main(*sys.argv[1:])
