"""Does DAC-KL's learned band keep its coverage on text it never saw, and follow the teacher?

    python experiments/dac_band.py TRAIN.jsonl VALID.jsonl --steps 80 --output dac_band.json

A student of half the teacher's layers is trained by DAC-KL on TRAIN. On VALID's completions the
trained band is then asked token by token: the share of the top-K's mass that it keeps, its width,
and how the width goes with the teacher's entropy (rank and linear correlation, and means by fifths
of the entropy). Rows hold `prompt` and `completion` or `reference`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.distill.batch import TrainingSequence, build_batch, stream_mask
from retort.distill.config import DistillConfig
from retort.distill.data import load_rows
from retort.distill.losses.dac import band_share, coverage, target_slots
from retort.distill.losses.rows import TokenRows
from retort.distill.signals import DenseSignal
from retort.distill.trainer import DistillTrainer
from retort.models import zoo
from retort.provenance import Provenance, write_json

FIFTHS = 5
TRAIN_ROWS = 2000


def main() -> None:
    """Train, measure on held-out text, write JSON."""
    given = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        run = DistillTrainer(
            args=_config(given, folder),
            train_dataset=load_rows(str(given.train)).select(range(TRAIN_ROWS)),
            eval_dataset=load_rows(str(given.valid)).select(range(given.valid_rows)),
            processing_class=zoo.load_tokenizer(given.teacher),
        )
        tokens = {"untrained": held_out(run)}
        run.train()
        tokens["trained"] = held_out(run)
    settings = {k: Path(v).name if isinstance(v, Path) else v for k, v in vars(given).items()}
    record = Provenance.collect(settings, {"seed": given.seed}).to_dict()
    found: dict[str, Any] = {name: summary(values, run) for name, values in tokens.items()}
    found["dual"] = [r["dac/dual"] for r in run.state.log_history if "dac/dual" in r]
    write_json(given.output, {**found, "provenance": {**record, "command": []}})


@torch.no_grad()
def held_out(run: Any) -> dict[str, Tensor]:
    """coverage, width, teacher's entropy (nats) and the KL's hidden share; each [tokens]."""
    run.model.eval()
    parts = []
    for row in run.eval_dataset:
        sequence = TrainingSequence(row["prompt_ids"], row["completion_ids"], False, True)
        batch = build_batch([sequence], 0)
        mask = stream_mask(batch, "distilled")
        hidden = run.student.hidden(batch["input_ids"], batch["attention_mask"])[mask]
        source = run.teacher.signal(batch, mask)
        signal = DenseSignal(source.rows(0, len(source)).logits)
        rows = TokenRows(run.student.head(hidden).float(), batch["targets"][mask], signal)
        parts.append(_tokens(run.objective.bands, rows))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _tokens(bands: Any, rows: TokenRows) -> dict[str, Tensor]:
    settings = bands.settings
    slots = target_slots(rows, settings.top_k)
    lower, upper = bands.network(slots.teacher[:, :-1], slots.student[:, :-1])
    keep = band_share(slots, lower, upper, settings.tau)
    entropy = -(rows.teacher.exp() * rows.teacher).sum(1)
    return {"coverage": coverage(slots, keep), "width": upper - lower, "entropy": entropy}


def summary(tokens: dict[str, Tensor], run: Any) -> dict[str, Any]:
    """Means, the share of tokens that fall back to the full band, and the correlations."""
    covered, width, entropy = (tokens[k].double() for k in ("coverage", "width", "entropy"))
    order = entropy.argsort().tensor_split(FIFTHS)
    least = run.objective.bands.settings.min_coverage
    return {
        "tokens": len(width),
        "coverage": float(covered.mean()),
        "below_min_coverage": float((covered < least).double().mean()),
        "width": float(width.mean()),
        "width_sd": float(width.std()),
        "correlation": {
            "rank": correlation(ranks(width), ranks(entropy)),
            "linear": correlation(width, entropy),
        },
        "by_entropy": [
            {
                "entropy": float(entropy[part].mean()),
                "width": float(width[part].mean()),
                "coverage": float(covered[part].mean()),
            }
            for part in order
        ],
    }


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's; None where one does not vary."""
    if a.std() < 1e-9 or b.std() < 1e-9:
        return None
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Ranks, equal values sharing their mean (so that `correlation` of them is Spearman's)."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


def _config(given: Any, folder: str) -> DistillConfig:
    return DistillConfig(
        output_dir=folder,
        method="kd",
        divergence="dac",
        model_name_or_path=given.teacher,
        student_num_hidden_layers=given.layers,
        teacher_model_name_or_path=given.teacher,
        max_steps=given.steps,
        per_device_train_batch_size=4,
        learning_rate=given.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_length=192,
        as_chat=True,
        skip_long_prompts=True,
        logging_steps=5,
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
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--valid-rows", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("dac_band.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
