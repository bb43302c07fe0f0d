"""The model `hivtp_llava_hf` for lmms-eval: its own `llava_hf`, pruned.

lmms-eval finds it by the entry point `lmms_eval.models`; nothing of lmms-eval is edited.

$ lmms-eval --model hivtp_llava_hf --model_args pretrained=DIR_OR_ID,budget=192 --tasks pope
"""

import logging
from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: a name, and the class that it imports when somebody asks for it.

    With an lmms-eval that takes no such manifest: nothing, and a warning that says why. Never
    raises, as lmms-eval would then leave out the models of all other plugins too.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest

        return ModelManifest("hivtp_llava_hf", chat_class_path=f"{__name__}.model.HivtpLlava")
    except Exception as error:
        # Logged, as `-W error` makes an exception of a warning.
        logging.getLogger(__name__).warning(
            "hivtp_lmms_eval needs lmms-eval>=0.7.3,<0.8, got one that does not register its model "
            "hivtp_llava_hf (%s: %s); other models are unaffected.",
            type(error).__name__,
            error,
        )
        return []
