"""`custom_generate=retort.speculative(...)` equals plain generate, row by row."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from retort.decode.hf import speculative
from retort.errors import ConfigurationError
from tests.decode.toys import prompts, reference, toy

NEW = 20


def _padded(texts):
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    return {"input_ids": ids, "attention_mask": mask}


def test_a_left_padded_batch_equals_batch_one_generate():
    model, texts = toy(), prompts()
    run = speculative("prompt-lookup", draft_budget=4)
    ids = model.generate(**_padded(texts), max_new_tokens=NEW, custom_generate=run)
    width = max(map(len, texts))
    for row, text in zip(ids, texts, strict=True):
        expected = reference(model, text, max_new_tokens=NEW)
        assert row[width : width + len(expected)].tolist() == expected
        assert set(row[width + len(expected) :].tolist()) <= {0}
    assert run.stats.accepted_tokens > 0


def test_output_object_streamer_and_refusals():
    model, text = toy(), prompts((6,))

    class Streamer:
        got, ended = (), False

        def put(self, value):
            self.got = (*self.got, *value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    out = model.generate(
        **_padded(text),
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        custom_generate=speculative("prompt-lookup", streamer=streamer),
    )
    assert out.sequences[0, len(text[0]) :].tolist() == list(streamer.got)
    assert streamer.ended
    with pytest.raises(ConfigurationError, match="num_beams"):
        model.generate(
            **_padded(text), num_beams=2, max_new_tokens=2, custom_generate=speculative()
        )


class _Mine(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return -scores


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"logits_processor": LogitsProcessorList([_Mine()])}, "_Mine"),
        ({"prefix_allowed_tokens_fn": lambda *_: [7]}, "PrefixConstrainedLogitsProcessor"),
        ({"encoder_repetition_penalty": 1.5}, "EncoderRepetitionPenaltyLogitsProcessor"),
        ({"max_time": 9.0}, "MaxTimeCriteria"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(options, named):
    model, text = toy(), prompts((6,))
    with pytest.raises(ConfigurationError, match=named):
        model.generate(**_padded(text), max_new_tokens=2, custom_generate=speculative(), **options)


def test_options_that_are_passed_on_are_not_refused():
    model, text = toy(), prompts((6,))
    shaped = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01}
    lengths = {"repetition_penalty": 1.1, "min_new_tokens": 2, "max_new_tokens": 4}
    ids = model.generate(**_padded(text), custom_generate=speculative(), **shaped, **lengths)
    assert ids.shape[1] >= len(text[0]) + 2
