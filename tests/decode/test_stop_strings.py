"""Stop strings through the engine: wherever accepted blocks cut them."""

import pytest

from retort.decode.engine import Engine
from tests.decode.test_engine import ScriptedDrafter
from tests.decode.toys import prompts, reference, toy

NEW = 24


class Letters:
    """A tokenizer whose tokens are one character each."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(0x4E00 + i) for i in ids)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_ends_the_text_at_every_offset_in_a_block(k, length):
    model, texts = toy(eos_token_id=None), prompts((6, 4))
    whole = [reference(model, p, max_new_tokens=NEW) for p in texts]
    answers = [p + e + [0] * 9 for p, e in zip(texts, whole, strict=True)]
    letters, accepted = Letters(), 0
    for start in range(2, 14):
        stop = letters.decode(whole[0][start : start + length])
        ends = [letters.decode(w).find(stop) for w in whole]
        for drafter in (None, ScriptedDrafter("right", answers)):
            with Engine(model, letters, drafter=drafter, draft_budget=k) as engine:
                outputs = engine.generate(texts, max_new_tokens=NEW, stop_strings=[stop])
                pieces = list(engine.stream(texts, max_new_tokens=NEW, stop_strings=[stop]))
            for i, (output, at) in enumerate(zip(outputs, ends, strict=True)):
                text = letters.decode(whole[i])
                assert output.text == (text[:at] if at >= 0 else text)
                assert output.finish_reason == ("stop" if at >= 0 else "length")
                kept = at + length if at >= 0 else NEW
                assert output.token_ids == whole[i][:kept]
                assert "".join(c.text for c in pieces if c.index == i) == output.text
            accepted += sum(o.stats.accepted_tokens for o in outputs)
    assert accepted > 0
