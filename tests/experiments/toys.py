"""A tiny model with a chat template, and files of tiny rows."""

import json

from tests.distill.toys import llama, tokenizer

WORDS = ("cat", "dog", "house", "tree", "sun", "road")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def save_model(folder, layers=3):
    made = tokenizer()
    made.chat_template = TEMPLATE
    llama(1, layers=layers).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def save_rows(path):
    name = path.stem
    rows = [{"id": f"{name}/{w}", "prompt": f"A {w}?", "reference": f"the {w}"} for w in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
