"""EleutherAI's lm-eval through its own Hugging Face model: the extra ``eval``.

Our models are transformers models, so that nothing of lm-eval is replaced here: this module only
hands over model and tokenizer, finds task files of yours, and flattens the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retort.errors import ConfigurationError, RetortError


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Run lm-eval's tasks on a loaded model; metrics by task, standard errors beside them.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks, or of those in ``include_path``.
        include_path: a folder of task files (YAML); with local data they need no network.
        limit: first documents of each task only.
        batch_size: rows at once.
        seed: of few-shot examples.

    Raises:
        RetortError: lm-eval is not installed.
        ConfigurationError: an unknown task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RetortError("lm-eval is missing: pip install 'retort-lm[eval]'") from error
    manager = _task_manager(tasks, include_path)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
    )
    return {task: _numbers(values) for task, values in found["results"].items()}


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Knows the tasks of ``include_path``, and lm-eval's thousands only where they are needed."""
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=path, include_defaults=path is None)
    if path is not None and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigurationError(
            f"lm-eval knows no task {unknown[0]!r}; give the folder of its file as include_path"
        )
    return manager


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """lm-eval's "acc,none" as "acc"; text such as an alias is left out."""
    kept = {k: v for k, v in values.items() if isinstance(v, int | float) and "," in k}
    return {key.replace(",none", ""): float(value) for key, value in kept.items()}
