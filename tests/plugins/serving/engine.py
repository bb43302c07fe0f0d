"""Answer requests with vLLM, or with `hivtp_transformers`: `engine.py vllm|transformers JOB OUT`.

A job is JSON: the checkpoint, options of the engine, requests of text, pictures and a budget, and
more of them that go one by one and may be refused.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
TOKENS = 8


def pictures(request):
    """The images of a request, `[seed, height, width]` each."""
    from checkpoints import picture

    return [picture(*numbers) for numbers in request["images"]]


def vllm(job):
    """Through the engine."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"], dtype="float32", enforce_eager=True, max_model_len=4096,
        limit_mm_per_prompt={"image": 2}, seed=0, **job["options"],
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)

    def prompt_of(request):
        prompt = {"prompt": request["text"], "multi_modal_data": {"image": pictures(request)}}
        if request.get("budget") is not None:
            prompt["mm_processor_kwargs"] = {"hivtp_budget": request["budget"]}
        return prompt

    def answer(out):
        said = out.outputs[0]
        return {
            "prompt": len(out.prompt_token_ids),
            "tokens": list(said.token_ids),
            "logprob": said.cumulative_logprob,
        }

    together = [prompt_of(request) for request in job["requests"]]
    answers = [answer(out) for out in llm.generate(together, sampling, use_tqdm=False)]
    for request in job["alone"]:
        try:
            (out,) = llm.generate(prompt_of(request), sampling, use_tqdm=False)
            answers.append(answer(out))
        except ValueError as error:
            answers.append({"error": str(error)})
    return answers


@torch.no_grad()
def transformers(job):
    """Through `hivtp_transformers`, one request at a time."""
    import hivtp_transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(job["model"])
    answers = []
    for request in job["requests"]:
        inputs = processor(images=pictures(request), text=request["text"], return_tensors="pt")
        budget = request.get("budget") or job["budget"]
        with hivtp_transformers.apply(model, budget=budget) as handle:
            out = model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                output_logits=True, return_dict_in_generate=True, eos_token_id=None,
            )  # fmt: skip
            stats = handle.stats
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
        logprobs = torch.stack(out.logits)[:, 0].log_softmax(-1).gather(1, tokens[:, None])
        length = inputs["input_ids"].shape[1] if stats is None else stats.prompt_after[0]
        answers.append({
            "prompt": length, "tokens": tokens.tolist(), "logprob": logprobs.sum().item(),
        })  # fmt: skip
    return answers


if __name__ == "__main__":
    name, job_path, out_path = sys.argv[1:]
    job = json.loads(Path(job_path).read_text())
    answers = {"vllm": vllm, "transformers": transformers}[name](job)
    Path(out_path).write_text(json.dumps(answers, indent=1))
