"""Makes torchvision importable where torch is built for CPUs: run by the Python of the environment that has it.

torchvision's builds on package indexes are for CUDA. Beside a torch without CUDA their library of operators can't be
loaded, which torchvision allows for; but then it describes two of them to torch, which knows of none. So they are
declared, by lines at the end of the module that looks for the library. They can't be called; what only prepares images
doesn't call them. vLLM imports torchvision for models that may be given images, such as Qwen3.5.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_DECLARED = """

if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    # Not by import, which is what fails.
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        sys.exit("torchvision is not installed in this environment")
    module = Path(spec.origin).with_name("extension.py")
    text = module.read_text(encoding="utf-8")
    if not text.endswith(_DECLARED):
        module.write_text(text + _DECLARED, encoding="utf-8")


if __name__ == "__main__":
    main()
