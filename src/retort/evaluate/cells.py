"""Judge one model on one data set: everything that a cell of the table holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retort.decode.admission import encode
from retort.decode.engine import Engine
from retort.distill.signals import check_vocabularies
from retort.evaluate.acceptance import acceptance
from retort.evaluate.answers import distinct_n, exact_match
from retort.evaluate.exposure import exposure_bias
from retort.evaluate.perplexity import completion_perplexity, perplexity
from retort.evaluate.rouge import rouge_l_scores
from retort.evaluate.runs import EvaluationSettings
from retort.evaluate.texts import generate_texts
from retort.models import zoo


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

    def judge(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """``metrics`` by name, and ``scores`` a prompt of those that have them."""
        model, teacher, tokenizer = self._models()
        texts = [row["text"] for row in rows if row.get("text") and not row.get("prompt")]
        found: dict[str, Any] = {"prompts": len(rows), "metrics": {}, "scores": {}}
        if texts:
            found["metrics"]["perplexity"] = perplexity(model, tokenizer, texts).value
        asked = [row for row in rows if row.get("prompt")]
        if asked:
            self._answers(model, tokenizer, asked, found)
        if asked and teacher is not None:
            self._taught(model, teacher, tokenizer, asked, found["metrics"])
        return found

    def _models(self) -> tuple[Any, Any, Any]:
        if self._loaded is None:
            tokenizer = zoo.load_tokenizer(self.folder)
            teacher = None if self.guide is None else zoo.load_model(self.guide)
            if self.guide is not None:
                check_vocabularies(teacher=zoo.load_tokenizer(self.guide), student=tokenizer)
            self._loaded = zoo.load_model(self.folder), teacher, tokenizer
        return self._loaded

    def _prompts(self, rows: list[dict[str, Any]], tokenizer: Any) -> list[list[int]]:
        chat = self.settings.as_chat
        given = [[{"role": "user", "content": r["prompt"]}] if chat else r["prompt"] for r in rows]
        return [encode(prompt, tokenizer) for prompt in given]

    def _answers(self, model: Any, tokenizer: Any, rows: list[dict], found: dict) -> None:
        prompts, metrics, scores = self._prompts(rows, tokenizer), found["metrics"], found["scores"]
        with Engine(model, tokenizer) as engine:
            made = generate_texts(engine, prompts, max_new_tokens=self.settings.max_new_tokens)
        references: list[Any] = [row.get("reference") or row.get("completion") for row in rows]
        if all(references):
            scores["rouge_l"] = rouge_l_scores(made.texts, references)
            firsts = [r if isinstance(r, str) else r[0] for r in references]
            ids = [list(tokenizer(r, add_special_tokens=False)["input_ids"]) for r in firsts]
            examples = [(p, r) for p, r in zip(prompts, ids, strict=True) if r]
            metrics["perplexity"] = completion_perplexity(model, examples).value
        if all(row.get("answer") is not None for row in rows):
            pairs = zip(made.texts, rows, strict=True)
            scores["exact_match"] = [exact_match(text, str(row["answer"])) for text, row in pairs]
        metrics |= {name: sum(values) / len(values) for name, values in scores.items()}
        metrics |= {f"distinct_{n}": distinct_n(made.texts, n) for n in (1, 2)}
        metrics["tokens"] = made.tokens / len(rows)
        found["texts"] = list(made.texts)

    def _taught(
        self, model: Any, teacher: Any, tokenizer: Any, rows: list[dict], metrics: dict
    ) -> None:
        prompts, settings = self._prompts(rows, tokenizer), self.settings
        limit = {"max_new_tokens": settings.max_new_tokens}
        drawn = {**limit, "do_sample": True, "seed": settings.seed}
        texts = []
        for writer in (model, teacher):
            with Engine(writer, tokenizer) as engine:
                made = generate_texts(engine, prompts, **drawn)
            texts.append([(p, t) for p, t in zip(prompts, made.token_ids, strict=True) if t])
        if all(texts):
            metrics["acceptance"] = acceptance(teacher, model, texts[1]).rate
            metrics["exposure_bias"] = exposure_bias(teacher, model, texts[0], texts[1]).excess
        options = {"drafter": model, "draft_budget": settings.draft_length}
        with Engine(teacher, tokenizer, **options) as engine:
            metrics["tokens_per_step"] = generate_texts(engine, prompts, **limit).tokens_per_step
