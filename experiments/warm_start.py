"""What a warm start is worth: a DenseRetNet with its teacher's MLPs against the same from scratch.

    python experiments/warm_start.py TRAIN.jsonl VALID.jsonl --steps 60 --output warm_start.json

Both students have the same size, data, seed and steps of forward KL; the loss on held-out rows is
recorded before, during and after. Rows hold `prompt` and `completion` or `reference`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from retort.distill.builders import dense_retnet_student
from retort.distill.config import DistillConfig
from retort.distill.data import load_rows
from retort.distill.trainer import DistillTrainer
from retort.models import zoo
from retort.provenance import Provenance, write_json


def main() -> None:
    """Train both students and write their held-out losses."""
    given = _arguments()
    teacher, tokenizer = zoo.load_model(given.teacher), zoo.load_tokenizer(given.teacher)
    arms = {name: _train(given, teacher, tokenizer, name == "warm") for name in ("cold", "warm")}
    settings = {k: Path(v).name if isinstance(v, Path) else v for k, v in vars(given).items()}
    record = Provenance.collect(settings, {"seed": given.seed}).to_dict()
    write_json(given.output, {"arms": arms, "provenance": {**record, "command": []}})


def _train(given: Any, teacher: Any, tokenizer: Any, warm: bool) -> list[dict[str, float]]:
    from transformers import set_seed

    set_seed(given.seed)
    size = teacher.config.intermediate_size
    same = {"num_attention_heads": teacher.config.num_attention_heads, "v_factor": 1}
    same |= {"query_key_dim": teacher.config.hidden_size, "mlp_intermediate_size": size}
    student = dense_retnet_student(teacher, given.layers, warm_start=warm, **same)
    rows, held_out = (load_rows(str(path)) for path in (given.train, given.valid))
    with tempfile.TemporaryDirectory() as folder:
        run = DistillTrainer(
            student,
            _config(given, folder),
            teacher,
            rows.select(range(given.steps * 4)),
            held_out.select(range(given.valid_rows)),
            processing_class=tokenizer,
        )
        start = run.evaluate()
        run.train()
    logs = [start | {"step": 0}, *(r for r in run.state.log_history if "eval_loss" in r)]
    kept = ("step", "eval_loss", "eval_acceptance")
    return [{key: record[key] for key in kept} for record in logs if record.get("step") is not None]


def _config(given: Any, folder: str) -> DistillConfig:
    return DistillConfig(
        output_dir=folder,
        method="kd",
        max_steps=given.steps,
        per_device_train_batch_size=4,
        learning_rate=given.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_length=128,
        as_chat=True,
        skip_long_prompts=True,
        freeze_embeddings=True,
        eval_strategy="steps",
        eval_steps=max(given.steps // 3, 1),
        save_strategy="no",
        seed=given.seed,
        use_cpu=True,
        disable_tqdm=True,
    )


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--teacher", default="smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--valid-rows", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("warm_start.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
