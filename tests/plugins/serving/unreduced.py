"""What happens without the all-reduce: vLLM imports this in its workers, for one check."""

from hivtp_vllm import vision

vision.tensor_model_parallel_all_reduce = lambda scores: scores


class Extension:
    """What `worker_extension_cls` names."""
