"""Unpadded batch speculation for people who stay in transformers' ``generate``.

    model.generate(**inputs, custom_generate=retort.speculative(drafter="prompt-lookup"))

``generate`` hands over left-padded ids and a fresh cache: padding is stripped from each row, the
cache is not used. What this path does not do (beams, guidance, a filled cache, own processors) is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retort.decode.engine import Engine
from retort.decode.request import RequestOutput, SamplingParams
from retort.errors import ConfigurationError

_SAME_NAME = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_REFUSED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "guidance_scale": 1.0,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "bad_words_ids": None,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
# What transformers builds out of options that are passed on; anything else would be ignored.
_KNOWN = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MaxLengthCriteria",
    "EosTokenCriteria",
}


def speculative(
    drafter: Any = "prompt-lookup",
    *,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    seed: int = 0,
    streamer: Any = None,
    **engine_options: Any,
) -> Callable:
    """A ``custom_generate`` callable that decodes the batch on the engine.

    Args:
        drafter: see `Engine`.
        tokenizer, stop_strings: given here and not to ``generate``, which would refuse them.
        seed: row ``i`` of a sampled batch uses ``seed + i``.
        streamer: a transformers streamer, for batches of one.
        engine_options: further arguments of `Engine`, such as ``draft_budget``.

    Returns:
        A callable for ``model.generate(custom_generate=…)``. It returns ids ``[batch, length]``,
        padded on the right, or a ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate``.
        The engine's counters of the last call are its attribute ``stats``.
    """

    def generate(model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any) -> Any:
        _refuse(generation_config, kwargs)
        rows = _strip_padding(input_ids, kwargs.get("attention_mask"))
        _check_streamer(streamer, rows)
        with Engine(model, tokenizer, drafter=drafter, **engine_options) as engine:
            for i, row in enumerate(rows):
                params = _params(generation_config, len(row), input_ids.shape[1])
                options = {**params, "stop_strings": stop_strings, "seed": seed + i}
                engine.add_request(row, SamplingParams.build(**options))
            outputs = _run(engine, streamer)
            generate.stats = engine.stats  # type: ignore[attr-defined]
        return _collect(input_ids, outputs, generation_config)

    return generate


def _run(engine: Engine, streamer: Any) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    shown = 0
    while engine.has_unfinished():
        live = [*engine.scheduler.running, *engine.scheduler.waiting]
        outputs += engine.step()
        if streamer is not None:
            new = live[0].output[shown:]
            shown += len(new)
            for token in new:
                streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    return sorted(outputs, key=lambda o: o.index)


def _params(config: Any, length: int, padded: int) -> dict:
    """Sampling options of one row; lengths in ``config`` count the padded prompt."""
    options = {k: v for k in _SAME_NAME if (v := getattr(config, k, None)) is not None}
    least = getattr(config, "min_new_tokens", None) or max((config.min_length or 0) - padded, 0)
    most = config.max_new_tokens or config.max_length - padded
    return options | {
        "max_new_tokens": most,
        "min_new_tokens": min(least, most),
        "eos_token_id": _as_list(config.eos_token_id),
    }


def _refuse(config: Any, kwargs: dict) -> None:
    wrong = [
        name
        for name, neutral in _REFUSED.items()
        if getattr(config, name, None) not in (None, neutral)
    ]
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        wrong.append("past_key_values (a filled cache)")
    given = (*(kwargs.get("logits_processor") or ()), *(kwargs.get("stopping_criteria") or ()))
    wrong += sorted({type(each).__name__ for each in given} - _KNOWN) if not wrong else []
    if wrong:
        raise ConfigurationError(
            f"retort.speculative does not handle {', '.join(wrong)}: remove it, or call generate "
            "without custom_generate"
        )


def _strip_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        return input_ids.tolist()
    keep = attention_mask[:, -input_ids.shape[1] :].bool()
    return [row[mask].tolist() for row, mask in zip(input_ids, keep, strict=True)]


def _check_streamer(streamer: Any, rows: list) -> None:
    if streamer is not None and len(rows) != 1:
        raise ConfigurationError(f"a streamer takes a batch of one, not of {len(rows)}")


def _collect(input_ids: Any, outputs: list[RequestOutput], config: Any) -> Any:
    pad = config.pad_token_id
    if pad is None:
        pad = next(iter(_as_list(config.eos_token_id)), 0)
    width = max(len(o.token_ids) for o in outputs)
    new = [o.token_ids + [pad] * (width - len(o.token_ids)) for o in outputs]
    ids = torch.cat((input_ids, input_ids.new_tensor(new).reshape(len(new), width)), 1)
    if not config.return_dict_in_generate:
        return ids
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=ids)  # type: ignore[arg-type]


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    flat = ids.tolist() if isinstance(ids, Tensor) else ids
    return [flat] if isinstance(flat, int) else list(flat)
