"""Distil a model into a student of half its layers with semantic revision (MGSR).

    python examples/distill.py [TEACHER] [OUTPUT_DIR]

Twelve rows and a few steps: it shows the calls, not a result. `retort demo` is the real loop.
"""

import sys

from datasets import Dataset

import retort
from retort.distill.init import cut_layers
from retort.models import zoo

ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"{a} plus {b} is {a + b}."}
    for a in range(1, 4)
    for b in range(1, 5)
]


def main(name: str = "smollm2-135m-instruct", output_dir: str = "runs/example") -> None:
    teacher = zoo.load_model(name, dtype="float32")
    tokenizer = zoo.load_tokenizer(name)
    student = cut_layers(teacher, max(1, teacher.config.num_hidden_layers // 2))
    args = retort.DistillConfig(
        output_dir=output_dir,
        method="mgsr",
        max_steps=3,
        per_device_train_batch_size=2,
        max_completion_length=16,
        max_length=128,
        logging_steps=1,
        learning_rate=1e-4,
        scrg_warmup_steps=0,
    )
    trainer = retort.DistillTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    print({k: round(v, 3) for k, v in last.items() if isinstance(v, float)})


if __name__ == "__main__":
    main(*sys.argv[1:])
