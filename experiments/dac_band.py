"""Does DAC-KL's learned band keep its coverage on text it never saw, and follow the teacher?

    python experiments/dac_band.py TRAIN.jsonl VALID.jsonl --steps 80 --output dac_band.json

A student of the teacher's most influential layers, half of them, is trained by SFT and DAC-KL on
TRAIN. On VALID's completions the trained band is then asked token by token: the share of the
top-K's mass that it keeps, its width, and how the width goes with the teacher's entropy (rank and
linear correlation, and means by fifths of the entropy). Rows hold `prompt` and `completion` or
`reference`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from small_run import configuration, first_rows, parser, write
from torch import Tensor

from retort.distill.batch import TrainingSequence, build_batch, stream_mask
from retort.distill.config import DistillConfig
from retort.distill.data import tokenize
from retort.distill.encoding import Encoding, end_tokens
from retort.distill.influence import layer_influence, most_influential
from retort.distill.init import keep_layers
from retort.distill.losses.dac import band_share, coverage, target_slots
from retort.distill.losses.rows import TokenRows
from retort.distill.signals import DenseSignal
from retort.distill.trainer import DistillTrainer
from retort.models import zoo

FIFTHS = 5
MAX_LENGTH = 192
INFLUENCE_ROWS = 24


def main() -> None:
    """Train, measure on held-out text, write JSON."""
    given = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        run = DistillTrainer(
            model=_student(given),
            args=_config(given, folder),
            train_dataset=first_rows(given.train, given.train_rows),
            eval_dataset=first_rows(given.valid, given.valid_rows),
            processing_class=zoo.load_tokenizer(given.teacher),
        )
        tokens = {"untrained": held_out(run)}
        run.train()
        tokens["trained"] = held_out(run)
    found: dict[str, Any] = {name: summary(values, run) for name, values in tokens.items()}
    found["dual"] = [r["dac/dual"] for r in run.state.log_history if "dac/dual" in r]
    write(given, found)


def _config(given: Any, folder: str) -> DistillConfig:
    changes = {"divergence": "dac", "sft_weight": 1.0, "freeze_embeddings": True}
    return configuration(
        given,
        folder,
        **changes,
        teacher_model_name_or_path=given.teacher,
        max_length=MAX_LENGTH,
        logging_steps=5,
    )


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
    alpha = torch.minimum(rows.teacher.exp(), rows.student.exp()).sum(1)
    found = {"coverage": coverage(slots, keep), "width": upper - lower}
    return {**found, "entropy": entropy, "acceptance": alpha}


def summary(tokens: dict[str, Tensor], run: Any) -> dict[str, Any]:
    """Means, the share of tokens that fall back to the full band, and the correlations."""
    covered, width, entropy = (tokens[k].double() for k in ("coverage", "width", "entropy"))
    order = entropy.argsort().tensor_split(FIFTHS)
    least = run.objective.bands.settings.min_coverage
    return {
        "tokens": len(width),
        "coverage": float(covered.mean()),
        "acceptance": float(tokens["acceptance"].mean()),
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


def _student(given: Any) -> Any:
    """The teacher's most influential layers, found on the first training rows that fit."""
    teacher, tokenizer = zoo.load_model(given.teacher), zoo.load_tokenizer(given.teacher)
    how = Encoding(tokenizer, end_tokens(tokenizer, teacher), MAX_LENGTH, True, True, True)
    rows = tokenize(first_rows(given.train, 3 * INFLUENCE_ROWS), how)
    texts = [r["prompt_ids"] + r["completion_ids"] for r in rows][:INFLUENCE_ROWS]
    return keep_layers(teacher, most_influential(layer_influence(teacher, texts), given.layers))


def _arguments() -> Any:
    defaults = {"layers": 15, "steps": 80, "train_rows": 2000, "valid_rows": 40}
    return parser(__doc__, "dac_band.json", **defaults, learning_rate=5e-4).parse_args()


if __name__ == "__main__":
    main()
