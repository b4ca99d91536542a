"""A program of its own: times transformers' `generate` on random weights and prompts of token ids.

`python decode_transformers.py JOB_JSON` prints one JSON line. Needs torch and transformers, and
nothing of this package, so that any interpreter that has those can run it.
"""

import json
import statistics
import sys
import time
from typing import Any


def run(job: dict[str, Any]) -> dict[str, float]:
    """Decode all rows repeatedly: seconds of the first run, and the median of the further ones."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(job["config"])
    torch.manual_seed(0)
    with torch.device(job["device"]):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job["dtype"])).eval()
        prompts = torch.tensor(job["prompts"])
    # Random weights may draw an end, and every row is to have all its tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def once() -> float:
        start = time.perf_counter()
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=job["temperature"],
            top_k=job["top_k"],
            num_return_sequences=job["samples"],
            max_new_tokens=job["new_tokens"],
        )
        if job["device"] == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        wanted = (len(prompts) * job["samples"], prompts.shape[1] + job["new_tokens"])
        assert tuple(out.shape) == wanted, f"{tuple(out.shape)} tokens, not {wanted}"
        return seconds

    with torch.inference_mode():
        return {
            "first_seconds": once(),
            "seconds": statistics.median(once() for _ in range(job["repeats"])),
        }


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    sys.stdout.write(json.dumps(run(job)) + "\n")
