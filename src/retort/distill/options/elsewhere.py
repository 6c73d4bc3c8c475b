"""What users of TRL and transformers look for under another name, and where it is here."""

from __future__ import annotations

from collections.abc import Iterable

from retort.errors import ConfigurationError

_INIT = "model_init_kwargs and teacher_model_init_kwargs give it to from_pretrained"
_QUANTIZED = "teacher_quantization loads the teacher in 8 or 4 bits"
_ENGINE = "texts are written on the engine (rollout_batch_size, rollout_drafter)"
_TOKENIZER = "set it on the tokenizer that the models were saved with"

FLAGS = {
    "assistant_only_loss": "the last answer of 'messages' is learned, and no other turn",
    "attn_implementation": _INIT,
    "dataset_text_field": "the columns are prompt and completion, messages, or text",
    "dtype": _INIT,
    "eos_token": _TOKENIZER,
    "group_by_length": "set train_sampling_strategy to group_by_length",
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "loss_type": "set method, or divergence",
    "max_new_tokens": "set max_completion_length",
    "max_prompt_length": "max_length bounds both, and skip_long_prompts leaves long prompts out",
    "num_generations": "each prompt gets one text in a step",
    "overwrite_output_dir": "a run goes on from its newest checkpoint: choose another output_dir",
    "pad_token": _TOKENIZER,
    "seq_kd": "set method to seqkd, or completions to teacher",
    "teacher_model": "set teacher_model_name_or_path",
    "torch_dtype": _INIT,
    "use_vllm": _ENGINE,
    "vllm_mode": _ENGINE,
    "warmup_ratio": "a warmup_steps below 1 is a share of all steps",
}
"""Flags and keys that are not fields of `DistillConfig`."""

_SCORED = "evaluation logs every term, and with predict_with_generate the scores of answers"

_KEYWORDS = {
    "compute_loss_func": "set method, or divergence and the weights",
    "compute_metrics": _SCORED,
    "data_collator": "sequences become batches once they are written",
    "formatting_func": "give rows of prompt and completion, messages, or text",
    "model_init": "give model",
    "peft_config": "set use_peft and the lora_ arguments, or give a PEFT model",
    "preprocess_logits_for_metrics": _SCORED,
    "tokenizer": "give it as processing_class",
}


def check_keywords(names: Iterable[str]) -> None:
    """Refuse keywords of other trainers that `DistillTrainer` would not read, in one line."""
    for name in sorted(_KEYWORDS.keys() & set(names)):
        raise ConfigurationError(f"DistillTrainer does not read {name}: {_KEYWORDS[name]}")
