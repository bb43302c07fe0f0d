"""Answer requests with vLLM: `engine.py JOB OUT`. `serving_checks.py` writes the job.

A job is JSON: `options` for the engine, `requests` to send as one batch, and requests to send
`alone` afterwards, one by one, which may be refused. A request is a text, its images as
`[seed, height, width]`, and a budget or null.
"""

import json
import sys
from pathlib import Path

from checkpoints import picture
from vllm import LLM, SamplingParams


def prompt_of(text, images, budget):
    """The request as vLLM takes it."""
    pictures = [picture(*numbers) for numbers in images]
    prompt = {"prompt": text, "multi_modal_data": {"image": pictures}}
    if budget is not None:
        prompt["mm_processor_kwargs"] = {"hivtp_budget": budget}
    return prompt


def answer_of(out):
    """What is compared: prompt length, tokens and their log-probability."""
    (said,) = out.outputs
    return {
        "prompt": len(out.prompt_token_ids),
        "tokens": list(said.token_ids),
        "logprob": said.cumulative_logprob,
    }


def run(options, requests, alone, tokens):
    """Start the engine and answer."""
    llm = LLM(limit_mm_per_prompt={"image": 2}, seed=0, **options)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    prompts = [prompt_of(*request) for request in requests]
    answers = [answer_of(out) for out in llm.generate(prompts, sampling, use_tqdm=False)]
    for request in alone:
        try:
            (out,) = llm.generate(prompt_of(*request), sampling, use_tqdm=False)
            answers.append(answer_of(out))
        except ValueError as error:
            answers.append({"error": str(error)})
    return answers


if __name__ == "__main__":
    job, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(run(**json.loads(job.read_text()))))
