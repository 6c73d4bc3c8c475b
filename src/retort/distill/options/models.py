"""Which method trains which student, and who teaches it."""

# ruff: noqa: RUF009  # `say` returns a dataclass field

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retort.distill.presets import PRESETS
from retort.train.arguments import say


@dataclass
class ModelOptions:
    """Method, student, adapter and teacher."""

    method: str = say("mgsr", f"What to train by: one of {', '.join(PRESETS)}.")

    model_name_or_path: str | None = say(None, "The student: zoo name, hub id or folder.")
    model_init_kwargs: dict[str, Any] | str | None = say(
        None, "Keywords of the student's from_pretrained, as JSON."
    )
    student_type: str | None = say(
        None, "'dense_retnet' or 'dense_mamba': built with the teacher's embedding and head."
    )
    warm_start: bool = say(
        False, "A student that is built begins with layers of the teacher, its MLPs among them."
    )
    student_num_hidden_layers: int | None = say(
        None, "Layers of the student: that many are cut out of model_name_or_path, or are built."
    )
    student_layer_indices: list[int] | None = say(
        None, "Or the very layers that are cut out, counted from 0 (see `layer_influence`)."
    )
    student_config: dict[str, Any] | str | None = say(
        None, "More configuration values of a student that is built, as JSON."
    )
    freeze_embeddings: bool = say(False, "Keep the student's embedding and head as they are.")
    use_peft: bool = say(
        False, "Train a LoRA adapter; without a teacher the student's base teaches. Needs peft."
    )
    lora_r: int = say(16, "Rank of the adapter.")
    lora_alpha: int = say(32, "The adapter's output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = say(0.0, "Dropout before the adapter; needs disable_dropout=False.")
    lora_target_modules: list[str] | None = say(
        None, "Modules that are adapted, or all-linear; by default PEFT's for the model."
    )
    teacher_model_name_or_path: str | None = say(
        None, "The teacher: zoo name, hub id or folder; must share the student's tokenizer."
    )
    teacher_model_revision: str | None = say(None, "Hub revision of the teacher.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = say(
        None, "Keywords of the teacher's from_pretrained, as JSON."
    )
    teacher_quantization: str | None = say(
        None, "'8bit' or '4bit': the teacher's linears by bitsandbytes, which must be installed."
    )
    teacher_url: str | None = say(
        None,
        "A teacher behind an OpenAI-compatible URL, up to and with /v1, writes the texts (seqkd).",
    )
    teacher_served_model_name: str | None = say(
        None, "The teacher's name there; not needed where the server offers one model."
    )
    teacher_signal: str | None = say(
        None, "Folder of `retort capture`, instead of the teacher's forwards on the dataset."
    )
    trust_remote_code: bool = say(False, "Allow models to bring code of their own.")
    disable_dropout: bool = say(True, "Set every dropout of the student to 0.")
