"""OpenVINO GenAI's continuous batching as an arm of ``retort bench decode``, in its own Python.

    python openvino_genai_decode.py MODEL_DIR THREADS plain|lookup

Reads a line ``{"prompts": [[ids]], "max_new_tokens": n}`` and answers a line with token ids and
times, until its input ends. The model comes from ``optimum-cli export openvino -m MODEL --task
text-generation-with-past --weight-format fp32 MODEL_DIR``. Decoding time is a whole call less a
call for one token.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai


def main() -> None:
    """Answer requests until the input ends."""
    folder, threads, mode = sys.argv[1:]
    pipe, config, told = pipeline(folder, int(threads), mode == "lookup")
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(measure(pipe, config, **request)), flush=True)


def pipeline(folder: str, threads: int, lookup: bool) -> tuple[Any, Any, dict[str, Any]]:
    """The pipeline in float32, how it generates, and all settings for the record."""
    places = {"cache_size": 2, "enable_prefix_caching": False}  # cache_size: GB
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    chosen: dict[str, Any] = {"do_sample": False}
    if lookup:
        options["prompt_lookup"] = True
        chosen |= {"num_assistant_tokens": 5, "max_ngram_size": 3}
    scheduler, config = genai.SchedulerConfig(), genai.GenerationConfig()
    for target, values in ((scheduler, places), (config, chosen)):
        for name, value in values.items():
            setattr(target, name, value)
    told = {
        "openvino_genai": genai.__version__,
        "openvino": ov.__version__,
        "device": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        "pipeline": "ContinuousBatchingPipeline",
        "properties": dict(options),
        "scheduler": places,
        "generation": chosen,
    }
    return genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", options), config, told


def measure(
    pipe: Any, config: Any, prompts: list[list[int]], max_new_tokens: int
) -> dict[str, Any]:
    """What `retort.evaluate.decoding.Measurement` wants to know."""
    first = run(pipe, config, prompts, 1)[1]
    ids, total = run(pipe, config, prompts, max_new_tokens)
    tokens = sum(map(len, ids)) - len(ids)
    return {
        "token_ids": ids,
        "tokens": tokens,
        "seconds": total - first,
        "total_seconds": total,
    }


def run(
    pipe: Any, config: Any, prompts: list[list[int]], new: int
) -> tuple[list[list[int]], float]:
    """Token ids and seconds of one call."""
    config.max_new_tokens = new
    inputs = [ov.Tensor(np.array([row], dtype=np.int64)) for row in prompts]
    started = time.perf_counter()
    results = pipe.generate(inputs, [config] * len(prompts))
    seconds = time.perf_counter() - started
    return [list(result.m_generation_ids[0]) for result in results], seconds


if __name__ == "__main__":
    main()
