"""Judge one model on one data set: everything that a cell of the table holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from retort.decode.admission import encode
from retort.decode.engine import Engine
from retort.decode.support import max_length
from retort.distill.signals import check_vocabularies
from retort.errors import ConfigurationError
from retort.evaluate.acceptance import acceptance
from retort.evaluate.answers import exact_match
from retort.evaluate.exposure import token_kl
from retort.evaluate.perplexity import text_nll, token_nll
from retort.evaluate.predictions import Example
from retort.evaluate.runs import EvaluationSettings
from retort.evaluate.scores import value_of
from retort.evaluate.texts import generate_texts
from retort.models import zoo
from retort.text_scores import distinct_n, rouge_l

Row = dict[str, Any]

WINDOW = 1024
"""Most tokens of a plain text that are read at once."""

_ADVICE = (
    "Acceptance and exposure bias compare predictions over one vocabulary: name a teacher with the "
    "run's tokenizer, or leave the teacher out."
)


class Judge:
    """One run's model, loaded at its first cell and released by `close`.

    With a teacher, acceptance α, measured tokens a step (the run's model drafts for the teacher)
    and exposure bias are measured too; both must share a tokenizer.
    """

    def __init__(self, folder: Path, teacher: Path | None, settings: EvaluationSettings) -> None:
        self.folder, self.guide, self.settings = folder, teacher, settings
        self._loaded: tuple[Any, Any, Any] | None = None

    def close(self) -> None:
        """Let the models go."""
        self._loaded = None

    def judge(self, rows: list[Row]) -> dict[str, Any]:
        """What a cell holds.

        ``scores`` have an entry a row, None where it lacks what the metric needs; ``metrics`` are
        made of the others, and ``scored`` counts those. ``texts`` are the answers.
        """
        model, teacher, tokenizer = self._models()
        asked = [i for i, row in enumerate(rows) if row.get("prompt")]
        found: dict[str, Any] = {"prompts": len(rows), "metrics": {}, "scored": {}, "scores": {}}
        plain = [row["text"] if i not in asked else None for i, row in enumerate(rows)]
        _keep(found, {"perplexity": self._read(model, tokenizer, plain)}, range(len(rows)))
        if asked:
            prompted = [rows[i] for i in asked]
            _keep(found, self._answers(model, tokenizer, prompted, found), asked)
            if teacher is not None:
                _keep(found, self._taught(model, teacher, tokenizer, prompted), asked)
        if not found["metrics"]:
            raise ConfigurationError("the texts hold no token to predict; give longer ones")
        return found

    def _models(self) -> tuple[Any, Any, Any]:
        if self._loaded is None:
            tokenizer = zoo.load_tokenizer(self.folder)
            if self.settings.as_chat and tokenizer.chat_template is None:
                raise ConfigurationError(
                    f"--as-chat: the tokenizer of {self.folder} has no chat template: leave it out"
                )
            if self.guide is not None:
                check_vocabularies(zoo.load_tokenizer(self.guide), tokenizer, _ADVICE)
            teacher = None if self.guide is None else zoo.load_model(self.guide)
            self._loaded = zoo.load_model(self.folder), teacher, tokenizer
        return self._loaded

    def _prompts(self, rows: list[dict[str, Any]], tokenizer: Any) -> list[list[int]]:
        chat = self.settings.as_chat
        given = [[{"role": "user", "content": r["prompt"]}] if chat else r["prompt"] for r in rows]
        return [encode(prompt, tokenizer) for prompt in given]

    def _read(self, model: Any, tokenizer: Any, texts: Sequence[str | None]) -> list[Any]:
        """The (Σ −log p, tokens) of each plain text, in windows that the model's context holds."""
        size = min(WINDOW, max_length(model.config) or WINDOW)
        return [None if t is None else _summed(text_nll(model, tokenizer, t, size)) for t in texts]

    def _answers(
        self, model: Any, tokenizer: Any, rows: list[Row], found: dict[str, Any]
    ) -> dict[str, list[Any]]:
        """Scores of the answers; what is no mean over rows goes to ``found`` at once."""
        prompts = self._prompts(rows, tokenizer)
        with Engine(model, tokenizer) as engine:
            made = generate_texts(engine, prompts, max_new_tokens=self.settings.max_new_tokens)
        numbers = {f"distinct_{n}": distinct_n(made.texts, n) for n in (1, 2)}
        found["metrics"] |= numbers | {"tokens": made.tokens / len(rows)}
        found["scored"] |= dict.fromkeys([*numbers, "tokens"], len(rows))
        found["texts"] = list(made.texts)
        references, answers = [references_of(row) for row in rows], [answer_of(row) for row in rows]
        return {
            "rouge_l": [
                rouge_l(text, refs) if refs else None
                for text, refs in zip(made.texts, references, strict=True)
            ],
            "exact_match": [
                None if answer is None else exact_match(text, answer)
                for text, answer in zip(made.texts, answers, strict=True)
            ],
            "reference_perplexity": [
                self._completion(model, tokenizer, prompt, refs[0]) if refs else None
                for prompt, refs in zip(prompts, references, strict=True)
            ],
        }

    def _completion(self, model: Any, tokenizer: Any, prompt: list[int], text: str) -> Any:
        """The (Σ −log p, tokens) of a reference, as far as the model's context reaches."""
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if (context := max_length(model.config)) is not None:
            ids = ids[: context - len(prompt)]
        return _summed(token_nll(model, [*prompt, *ids], len(prompt))) if ids else None

    def _taught(
        self, model: Any, teacher: Any, tokenizer: Any, rows: list[Row]
    ) -> dict[str, list[Any]]:
        """Scores beside the teacher; a row of which either wrote nothing has none."""
        prompts, settings = self._prompts(rows, tokenizer), self.settings
        limit = {"max_new_tokens": settings.max_new_tokens}
        drawn = {**limit, "do_sample": True, "seed": settings.seed}
        written = []
        for writer in (model, teacher):
            with Engine(writer, tokenizer) as engine:
                texts = generate_texts(engine, prompts, **drawn).token_ids
            written.append(list(zip(prompts, texts, strict=True)))
        options = {"drafter": model, "draft_budget": settings.draft_length}
        with Engine(teacher, tokenizer, **options) as engine:
            made = generate_texts(engine, prompts, **limit)
        return {
            "acceptance": [_accepted(teacher, model, text) for text in written[1]],
            "exposure_bias": [
                _divergences(teacher, model, own, oracle)
                for own, oracle in zip(*written, strict=True)
            ],
            "tokens_per_step": [
                [len(ids), steps] for ids, steps in zip(made.token_ids, made.steps, strict=True)
            ],
        }


def references_of(row: Row) -> list[str]:
    """The texts that an answer is compared with; empty and blank ones are none."""
    given = row.get("reference") or row.get("completion") or []
    return [text for text in ([given] if isinstance(given, str) else given) if text.strip()]


def answer_of(row: Row) -> str | None:
    """What the final number is compared with; an empty or blank one is none."""
    given = row.get("answer")
    return None if given is None or not str(given).strip() else str(given)


def _keep(found: dict[str, Any], scores: Mapping[str, list[Any]], places: Sequence[int]) -> None:
    """Add scores of the rows at ``places``, and the metrics that any row has a score of."""
    for name, values in scores.items():
        given = [value for value in values if value is not None]
        if given:
            by_place = dict(zip(places, values, strict=True))
            found["scores"][name] = [by_place.get(i) for i in range(found["prompts"])]
            found["metrics"][name], found["scored"][name] = value_of(name, given), len(given)


def _summed(nll: Tensor) -> list[float] | None:
    """(Σ, tokens); None of no token."""
    return [nll.double().sum().item(), nll.numel()] if nll.numel() else None


def _accepted(teacher: Any, model: Any, text: Example) -> list[float] | None:
    """(Σ over tokens of α, tokens)."""
    count = len(text[1])
    return [acceptance(teacher, model, [text]).rate * count, count] if count else None


def _divergences(teacher: Any, model: Any, own: Example, oracle: Example) -> list[Any] | None:
    if not own[1] or not oracle[1]:
        return None
    return [token_kl(teacher, model, text).tolist() for text in (own, oracle)]
