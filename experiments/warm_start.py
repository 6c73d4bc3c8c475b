"""What a warm start is worth: a DenseRetNet with its teacher's MLPs against the same from scratch.

    python experiments/warm_start.py TRAIN.jsonl VALID.jsonl --steps 60 --output warm_start.json

Both students have the same size, data, seed and steps of forward KL; the loss on held-out rows is
recorded before, during and after. Rows hold `prompt` and `completion` or `reference`.
"""

from __future__ import annotations

import tempfile
from typing import Any

from small_run import configuration, first_rows, parser, write

from retort.distill.builders import dense_retnet_student
from retort.distill.config import DistillConfig
from retort.distill.trainer import DistillTrainer
from retort.models import zoo


def main() -> None:
    """Train both students and write their held-out losses."""
    given = _arguments()
    teacher, tokenizer = zoo.load_model(given.teacher), zoo.load_tokenizer(given.teacher)
    arms = {name: _train(given, teacher, tokenizer, name == "warm") for name in ("cold", "warm")}
    write(given, {"arms": arms})


def _train(given: Any, teacher: Any, tokenizer: Any, warm: bool) -> list[dict[str, float]]:
    from transformers import set_seed

    set_seed(given.seed)
    size = teacher.config.intermediate_size
    same = {"num_attention_heads": teacher.config.num_attention_heads, "v_factor": 1}
    same |= {"query_key_dim": teacher.config.hidden_size, "mlp_intermediate_size": size}
    student = dense_retnet_student(teacher, given.layers, warm_start=warm, **same)
    with tempfile.TemporaryDirectory() as folder:
        run = DistillTrainer(
            student,
            _config(given, folder),
            teacher,
            first_rows(given.train, given.steps * 4),
            first_rows(given.valid, given.valid_rows),
            processing_class=tokenizer,
        )
        start = run.evaluate()
        run.train()
    logs = [start | {"step": 0}, *(r for r in run.state.log_history if "eval_loss" in r)]
    kept = ("step", "eval_loss", "eval_acceptance")
    return [{key: record[key] for key in kept} for record in logs if record.get("step") is not None]


def _config(given: Any, folder: str) -> DistillConfig:
    return configuration(
        given,
        folder,
        max_length=128,
        freeze_embeddings=True,
        eval_strategy="steps",
        eval_steps=max(given.steps // 3, 1),
    )


def _arguments() -> Any:
    defaults = {"layers": 8, "steps": 60, "valid_rows": 24, "learning_rate": 1e-3}
    return parser(__doc__, "warm_start.json", **defaults).parse_args()


if __name__ == "__main__":
    main()
