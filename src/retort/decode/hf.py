"""Unpadded batch speculation for people who stay in transformers' ``generate``.

    model.generate(**inputs, custom_generate=retort.speculative(drafter="prompt-lookup"))

``generate`` hands over left-padded ids and a fresh cache: padding is stripped from each row, the
cache is not used. The generation configuration, logits processors and stopping criteria mean what
they mean for each row alone; the caller's own see one row at a time, so that what they remember
from call to call is of several rows. What this path does not do (beams, guidance, a filled cache)
is refused by name. Rows end at the model's context, with a warning, where ``generate`` would go on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retort.decode.engine import Engine
from retort.decode.hf_rows import Processors, RowProcessors, split_criteria
from retort.decode.outputs import require_whole
from retort.decode.params import SamplingParams
from retort.decode.request import Request, RequestOutput
from retort.errors import ConfigurationError

_REFUSED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "guidance_scale": 1.0,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "output_attentions": False,
    "output_hidden_states": False,
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
        tokenizer, stop_strings: given here and not to ``generate``, which needs both together.
        seed: prompt ``i`` of a sampled batch uses ``seed + i``; each of ``num_return_sequences``
            draws noise of its own.
        streamer: a transformers streamer for a batch of one, or a list of one for each row.
        engine_options: further arguments of `Engine`, such as ``draft_budget``.

    Returns:
        A callable for ``model.generate(custom_generate=…)``. It returns ids ``[batch, length]``,
        padded on the right, or a ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate``,
        whose scores and logits are zero after a row's end. The engine's counters of the last call
        are its attribute ``stats``.

    Raises:
        RetortError: a row failed, such as in a processor of the caller's; the row is named.
    """

    def generate(
        model: Any,
        input_ids: Tensor,
        generation_config: Any,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        **kwargs: Any,
    ) -> Any:
        config, mask = generation_config, kwargs.get("attention_mask")
        _refuse(config, kwargs)
        rows = _strip_padding(input_ids, mask)
        streamers = _streamers(streamer, len(rows))
        processors = Processors(model, config, input_ids, mask, logits_processor)
        shaping = [processors.row(i, row, _keeps(config)) for i, row in enumerate(rows)]
        shared = _shared(config, stopping_criteria, input_ids.shape[1], stop_strings)
        copies = config.num_return_sequences
        with Engine(model, tokenizer, drafter=drafter, **engine_options) as engine:
            for i, row in enumerate(rows):
                own = {"seed": seed + i // copies, "logits_processors": _given(shaping[i])}
                params = SamplingParams.build(**shared, **own)
                engine.add_request(row, params, sample=i % copies)
            outputs = _run(engine, streamers)
            generate.stats = engine.stats  # type: ignore[attr-defined]
        _warn_of_short(outputs, shared["max_new_tokens"])
        return _collect(input_ids, outputs, config, shaping)

    return generate


def _shared(config: Any, criteria: Any, padded: int, stop_strings: Any) -> dict:
    """Options that all rows have in common; lengths in ``config`` count the padded prompt."""
    longest, ends, others = split_criteria(criteria)
    most = (config.max_length if longest is None else longest) - padded
    return {
        "do_sample": bool(config.do_sample),
        "max_new_tokens": most,
        "eos_token_id": ends,
        "stopping_criteria": others,
        "stop_strings": stop_strings,
        "n": config.num_return_sequences,
    }


def _given(shaping: RowProcessors) -> tuple[RowProcessors, ...]:
    return (shaping,) if shaping else ()


def _keeps(config: Any) -> bool:
    wanted = config.output_scores or config.output_logits
    return bool(config.return_dict_in_generate and wanted)


def _run(engine: Engine, streamers: Sequence[Any]) -> list[RequestOutput]:
    requests = list(engine.scheduler.waiting)
    for request in requests:
        request.together = not streamers
    outputs: list[RequestOutput] = []
    shown = [0] * len(requests)
    for streamer, request in zip(streamers, requests, strict=False):
        streamer.put(torch.tensor([request.prompt]))
    while engine.has_unfinished():
        outputs += require_whole(engine.step())
        _show(streamers, requests, shown)
    for streamer in streamers:
        streamer.end()
    return sorted(outputs, key=lambda o: o.index)


def _show(streamers: Sequence[Any], requests: Sequence[Request], shown: list[int]) -> None:
    """Give each streamer its row's new tokens, one by one as ``generate`` does."""
    for i, streamer in enumerate(streamers):
        for token in requests[i].output[shown[i] :]:
            streamer.put(torch.tensor([token]))
            shown[i] += 1


def _warn_of_short(outputs: Sequence[RequestOutput], wanted: int) -> None:
    """``generate`` goes on beyond the context where a model can, with a warning of its own."""
    short = [o for o in outputs if o.finish_reason == "length" and len(o.token_ids) < wanted]
    if short:
        length = len(short[0].prompt_token_ids) + len(short[0].token_ids)
        rows = ", ".join(str(o.index) for o in short)
        warnings.warn(
            f"rows {rows} (from 0) reached the model's context of {length} tokens and end there, "
            f"with fewer than {wanted} new ones; transformers' own generate would go on",
            stacklevel=2,
        )


def _refuse(config: Any, kwargs: dict) -> None:
    wrong = [
        name
        for name, neutral in _REFUSED.items()
        if getattr(config, name, None) not in (None, neutral)
    ]
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        wrong.append("past_key_values (a filled cache)")
    if kwargs.get("inputs_embeds") is not None:
        wrong.append("inputs_embeds")
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


def _streamers(given: Any, rows: int) -> list[Any]:
    streamers = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if streamers and len(streamers) != rows:
        raise ConfigurationError(
            f"{len(streamers)} streamer for a batch of {rows}: give a list of one for each row"
        )
    return streamers


def _collect(
    input_ids: Any, outputs: list[RequestOutput], config: Any, shaping: Sequence[RowProcessors]
) -> Any:
    new = [o.token_ids for o in outputs]
    width = max(map(len, new))
    padded = [row + [_pad(config)] * (width - len(row)) for row in new]
    ids = torch.cat((input_ids, input_ids.new_tensor(padded).reshape(len(new), width)), 1)
    if not config.return_dict_in_generate:
        return ids
    from transformers.generation import GenerateDecoderOnlyOutput

    lengths = [len(row) for row in new]
    scores = _steps([s.scores for s in shaping], lengths) if config.output_scores else None
    logits = _steps([s.logits for s in shaping], lengths) if config.output_logits else None
    return GenerateDecoderOnlyOutput(
        sequences=ids,  # type: ignore[arg-type]
        scores=scores,  # type: ignore[arg-type]
        logits=logits,  # type: ignore[arg-type]
    )


def _steps(rows: Sequence[list[Tensor]], lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """For each step ``[batch, vocab]``; zero after a row's end."""
    if not any(lengths):
        return ()
    empty = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(
        torch.stack([r[step] if step < n else empty for r, n in zip(rows, lengths, strict=True)])
        for step in range(max(lengths))
    )


def _pad(config: Any) -> int:
    given = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    first = torch.as_tensor([] if given is None else given).flatten().tolist()
    return int(next(iter(first), 0))
