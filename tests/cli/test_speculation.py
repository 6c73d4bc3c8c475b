"""vLLM's names for what drafts mean what ours do."""

import pytest

from retort.cli.speculation import drafting
from retort.errors import ConfigurationError

FLAGS = ("drafter", "spec_method", "spec_model", "spec_tokens", "speculative_config")


def resolve(**given):
    return drafting({**dict.fromkeys(FLAGS), "draft_budget": "auto", **given})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, "auto")),
        ({"drafter": "m", "draft_budget": "3"}, ("m", "3")),
        ({"spec_method": "ngram"}, ("prompt-lookup", "auto")),
        ({"spec_method": "ngram", "spec_tokens": 5}, ("prompt-lookup", "5")),
        ({"spec_model": "small"}, ("small", "auto")),
        ({"spec_method": "draft_model", "spec_model": "small", "spec_tokens": 0}, ("small", "0")),
        ({"spec_method": "none"}, (None, "auto")),
        (
            {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 4}'},
            ("prompt-lookup", "4"),
        ),
        ({"speculative_config": '{"model": "small"}'}, ("small", "auto")),
    ],
)
def test_names(given, expected):
    assert resolve(**given) == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"drafter": "m", "spec_method": "ngram"}, "not both"),
        ({"spec_method": "medusa"}, "medusa"),
        ({"spec_method": "ngram", "spec_model": "m"}, "without a model"),
        ({"spec_method": "draft_model"}, "draft_model with one"),
        ({"spec_tokens": 3}, "method=None"),
        ({"spec_method": "ngram", "spec_tokens": 3, "draft_budget": "2"}, "not both"),
        ({"speculative_config": "{"}, "not JSON"),
        ({"speculative_config": "[]"}, "JSON object"),
        ({"speculative_config": '{"metod": "ngram"}'}, "unknown key 'metod'"),
        ({"speculative_config": '{"method": "ngram"}', "spec_tokens": 3}, "not both"),
        (
            {"speculative_config": '{"method": "ngram", "num_speculative_tokens": "4"}'},
            "whole number",
        ),
    ],
)
def test_what_is_refused(given, text):
    with pytest.raises(ConfigurationError, match=text):
        resolve(**given)
