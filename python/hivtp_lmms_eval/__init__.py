"""The model `hivtp_llava_hf` for lmms-eval: its own `llava_hf`, pruned.

lmms-eval finds it through the entry point `lmms_eval.models`; nothing in lmms-eval is changed.

$ lmms-eval --model hivtp_llava_hf --model_args pretrained=DIR_OR_ID,budget=192 --tasks pope
"""

import logging
from typing import Any


def manifest() -> Any:
    """Return what lmms-eval registers: the model's name and the class to import when it is used.

    With an lmms-eval that has no such manifests, returns an empty list and logs why. Never raises:
    lmms-eval would then leave out the models of all other plugins, too.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest

        return ModelManifest("hivtp_llava_hf", chat_class_path=f"{__name__}.model.HivtpLlava")
    except Exception as error:
        # Logged, because `-W error` turns a warning into an exception.
        logging.getLogger(__name__).warning(
            "hivtp_lmms_eval needs lmms-eval>=0.7.3,<0.8, got one that does not register its model "
            "hivtp_llava_hf (%s: %s); other models are unaffected.",
            type(error).__name__,
            error,
        )
        return []
