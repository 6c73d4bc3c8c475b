"""An on-policy step: Retort beside TRL's DistillationTrainer and GKD, each with its phases.

    python bench/distill_step.py --prompts dolly_train.jsonl --trl TRL_ENV/bin/python

Every arm is a process of its own (peak memory is its own too); arms take turns step by step. The
teacher is --model, the student half of its layers. Writes JSON with machine and versions, and
prints a table. The teacher's phase is its passes; in Retort's and DistillationTrainer's the head
runs inside the loss, in GKD's inside the pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from retort.distill.init import cut_layers
from retort.models import zoo
from retort.provenance import Provenance, write_json

WORKER = Path(__file__).parent / "peers" / "distill_worker.py"
PHASES = ("rollout", "teacher", "train")


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        settings = prepare(options, Path(folder))
        arms = {"retort": Arm(sys.executable, "retort", settings)}
        for name in options.peers if options.trl else []:
            arms[name] = Arm(options.trl, name, settings)
        rounds = [{name: arm.step() for name, arm in arms.items()} for _ in range(options.rounds)]
        for arm in arms.values():
            arm.close()
    results = {name: summary([r[name] for r in rounds[options.warmup :]]) for name in arms}
    for name in list(results)[1:]:
        results[name]["compared"] = compared(results["retort"], results[name])
    show(results)
    record = Provenance.collect({**vars(options), "trl": None, "output": None}).to_dict()
    record["command"], record["arguments"]["prompts"] = [], Path(options.prompts).name
    record["peer_versions"] = {name: arm.versions for name, arm in arms.items()}
    write_json(options.output, {"provenance": record, "rounds": rounds, "results": results})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", required=True, help="JSONL with `prompt` and `reference`")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=15, help="of the student")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--trl", help="Python of an environment with TRL")
    parser.add_argument("--peers", nargs="+", default=["trl", "trl-gkd"])
    parser.add_argument("--output", type=Path, default=Path("bench-distill-step.json"))
    return parser.parse_args()


def prepare(options: argparse.Namespace, folder: Path) -> Path:
    """Save the student and rows of alike length; the settings file that every arm reads."""
    teacher = zoo.load_model(options.model)
    tokenizer = zoo.load_tokenizer(options.model)
    cut_layers(teacher, options.layers).save_pretrained(folder / "student")
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    rows = []
    for line in Path(options.prompts).read_text("utf-8").strip().split("\n"):
        row = json.loads(line)
        if 30 <= len(tokenizer(row["prompt"]).input_ids) <= 50:
            said = [{"role": "assistant", "content": row["reference"][:200]}]
            prompt = [{"role": "user", "content": row["prompt"]}]
            rows.append({"prompt": prompt, "completion": said})
    count = options.batch_size * options.rounds
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:count]), "utf-8")
    settings = {
        "folder": str(folder),
        "student": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "rows": str(folder / "rows.jsonl"),
        "steps": options.rounds,
        "batch_size": options.batch_size,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "gradient_checkpointing": options.gradient_checkpointing,
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(settings), "utf-8")
    return path


class Arm:
    """A trainer in a process of its own."""

    def __init__(self, python: str, name: str, settings: Path) -> None:
        command = [python, str(WORKER), name, str(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = json.loads(self.process.stdout.readline())["versions"]

    def step(self) -> dict[str, float]:
        """One optimiser step; `train` is what writing and the teacher leave of it."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        return {**found, "train": found["step"] - found["rollout"] - found["teacher"]}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """Medians over rounds; the peak is the largest."""
    found = {key: median(step[key] for step in steps) for key in ("step", *PHASES, "tokens")}
    found["rollout_tokens_per_second"] = found["tokens"] / found["rollout"]
    return found | {"peak_bytes": max(step["peak_bytes"] for step in steps)}


def compared(ours: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    """Rollouts by tokens/s; `allowed` is the step's speed-up if nothing else changed."""
    gain = ours["rollout_tokens_per_second"] / peer["rollout_tokens_per_second"]
    rest = peer["step"] - peer["rollout"]
    allowed = peer["step"] / (peer["rollout"] / gain + rest)
    step = peer["step"] / ours["step"]
    return {"rollouts": gain, "step": step, "allowed": allowed, "share": step / allowed}


def show(results: dict[str, dict]) -> None:
    print("| arm | step s | rollout | teacher | train | tokens | tokens/s | peak GB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, r in results.items():
        times = " | ".join(f"{r[key]:.2f}" for key in ("step", *PHASES))
        speed = f"{r['tokens']:.0f} | {r['rollout_tokens_per_second']:.0f}"
        print(f"| {name} | {times} | {speed} | {r['peak_bytes'] / 1e9:.2f} |")
    for name, r in list(results.items())[1:]:
        c = r["compared"]
        print(
            f"over {name}: rollouts {c['rollouts']:.2f}×, step {c['step']:.2f}× of the "
            f"{c['allowed']:.2f}× that the split allows ({c['share']:.0%})"
        )


if __name__ == "__main__":
    main()
