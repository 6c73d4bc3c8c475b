"""The joint claim: DenseRetNet students as drafters of the teacher that trained them.

Of each student, on validation prompts: acceptance α (what speculative sampling accepts of its
draws) and agreement (what greedy verification accepts) on the teacher's own texts; fixed-length
greedy decoding of the teacher with it, against the teacher alone in the same rounds, with the same
tokens asserted; and the α from which drafting with it pays.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cells import RETNET_BASE, RETNET_METHODS, TEACHER, Cell
from judging import chat, questions
from settings import VALIDATION, Places, Settings

from retort.decode.admission import encode
from retort.decode.engine import Engine
from retort.errors import RetortError
from retort.evaluate.acceptance import acceptance, break_even
from retort.evaluate.decoding import ArmResult, compare, engine_arm
from retort.evaluate.texts import generate_texts
from retort.models import zoo

REPEATS = 3
PLAIN, LOOKUP = "teacher alone", "prompt-lookup"
Tokens = list[list[int]]


def joint(settings: Settings, places: Places) -> dict[str, Any]:
    """Both measures of every drafter, by its label."""
    teacher = zoo.load_model(places.model(TEACHER.name))
    tokenizer = zoo.load_tokenizer(places.model(TEACHER.name))
    rows = questions(
        places.data / f"{VALIDATION}.jsonl", tokenizer, settings.joint_prompts, settings
    )
    prompts = [encode(chat(row["prompt"]), tokenizer) for row in rows]
    students = {cell.label: places.model(cell.name) for cell in drafters()}
    timed = prompts[: settings.joint_timed]
    speeds = decoding(teacher, tokenizer, students, timed, settings)
    texts = drawn(teacher, tokenizer, prompts, settings)
    for label, folder in students.items():
        found = acceptance(teacher, zoo.load_model(folder), texts)
        speeds[label] |= {"acceptance": found.rate, "agreement": found.agreement}
    counts = {"prompts": len(prompts), "timed": len(timed), "draft": settings.joint_draft}
    return {**counts, "arms": speeds}


def drafters() -> list[Cell]:
    """The students of the table; the one that all methods started from stands first."""
    return [RETNET_BASE, *(Cell("retnet-main", method, method, 1) for method in RETNET_METHODS)]


def drawn(teacher: Any, tokenizer: Any, prompts: Tokens, settings: Settings) -> list[Any]:
    """Prompts with texts that the teacher drew."""
    how = {"max_new_tokens": settings.max_new_tokens, "do_sample": True, "seed": 0}
    with Engine(teacher, tokenizer) as engine:
        made = generate_texts(engine, prompts, **how)
    return [(p, t) for p, t in zip(prompts, made.token_ids, strict=True) if t]


def decoding(
    teacher: Any, tokenizer: Any, students: dict[str, Path], prompts: Tokens, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Every arm over the same prompts, one row at a time; all write the same tokens.

    Raises RetortError when an arm changed the teacher's text.
    """
    options = {PLAIN: None, LOOKUP: LOOKUP, **{label: str(p) for label, p in students.items()}}
    with ExitStack() as stack:
        arms = {}
        for name, drafter in options.items():
            engine = Engine(teacher, tokenizer, drafter=drafter, draft_budget=settings.joint_draft)
            arms[name] = engine_arm(stack.enter_context(engine), ignore_eos=True)
        found = list(compare(arms, prompts, settings.max_new_tokens, REPEATS, batch_size=1))
    wrong = [arm.arm for arm in found if not arm.equal_to_plain]
    if wrong:
        raise RetortError(f"{wrong} changed the teacher's text")
    return {arm.arm: _line(arm, settings.joint_draft) for arm in found}


def _line(arm: ArmResult, draft: int) -> dict[str, Any]:
    """An arm's numbers; a step's cost is in steps of the teacher alone."""
    cost = arm.tokens_per_step / arm.ratio
    pays = None if arm.arm in (PLAIN, LOOKUP) else break_even(cost, draft)
    return {
        "tokens_per_second": arm.tokens_per_second,
        "ratio": arm.ratio,
        "ratio_95": [arm.ratio_low, arm.ratio_high],
        "tokens_per_step": arm.tokens_per_step,
        "step_cost": cost,
        "break_even": pays,
    }
