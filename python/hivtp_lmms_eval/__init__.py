"""The model `hivtp_llava` for lmms-eval: its own `llava_hf`, pruned by `hivtp_llava.apply`.

lmms-eval finds it by the entry point `lmms_eval.models`; nothing of lmms-eval is edited.

$ lmms-eval --model hivtp_llava --model_args pretrained=DIR_OR_ID,budget=192 --tasks pope
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: a name, and the class that it imports when somebody asks for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("hivtp_llava", chat_class_path=f"{__name__}.model.HivtpLlava")
