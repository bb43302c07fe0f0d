"""vLLM imports this into its workers for one check: the all-reduce of scores is left out."""

from hivtp_vllm import vision

vision.tensor_model_parallel_all_reduce = lambda scores: scores


class Extension:
    """The class that `worker_extension_cls` names."""
