"""An adapter as files in PEFT's format, with the optimizer's state beside them.

    adapter_config.json           rank, alpha, target modules, target parameters
    adapter_model.safetensors     A and B by PEFT name, float32; what `twinkle.layouts` needs is in its metadata
    README.md                     for whoever downloads it, see `model_card`
    optimizer.safetensors         `exp_avg.{name}`, `exp_avg_sq.{name}`, float32; the step is in its metadata

Routed experts' parameters are PEFT's target parameters. PEFT puts a wrapper for each around their module, the last
parameter's outermost, and names matrices by the wrappers' position (`peft.tuners.lora.layer.ParamWrapper`); in an
adapter's state they are named by their parameters, like all others:

    in the file                                     in the state
    ...mlp.experts.base_layer.lora_A.weight         ...mlp.experts.gate_up_proj.lora_A.weight
    ...mlp.experts.lora_A.weight                    ...mlp.experts.down_proj.lora_A.weight

In a mixture of experts the linear layers of shared experts and dense feed-forward parts are target parameters too,
`...mlp.gate_proj.weight`: among target modules PEFT takes such names for the routed experts of
Transformers 4. The names of their matrices are the same either way.

`PeftModel.from_pretrained` loads what is written here. Gradients not yet applied are not written. Only the format is
here; the store decides where files are, and checks that they are whole. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from twinkle.layouts import CONFIG, SERVING_CLASS, SERVING_NAMES, WEIGHTS
from twinkle.protocol.errors import InvalidRequest, words_of
from twinkle.protocol.types import Array, Float32Array
from twinkle.server.backends.lora.adapter_state import check_arrays, peft_names
from twinkle.server.backends.lora.model_card import model_card
from twinkle.server.backends.lora.module_groups import EXPERT_PARAMETERS, is_expert_parameter, module_group
from twinkle.server.backends.protocol import (
    PLAIN_MODEL,
    AdapterSpec,
    AdapterState,
    ExportFacts,
    OptimizerState,
)

OPTIMIZER = "optimizer.safetensors"
README = "README.md"

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_WRAPPED = ".base_layer"
# Names that PEFT takes for routed experts' projections if they are among the target modules of such a model.
_LIKE_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"})
# PEFT settings that change what an adapter computes, each with the values that mean "not used".
_UNUSED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
}


def peft_config(state: AdapterState, base_model: str, facts: ExportFacts) -> dict[str, object]:
    """The content of an adapter's `adapter_config.json`."""
    alpha = state.spec.alpha
    parameters: list[str] = []
    for name in state.target_modules:
        if is_expert_parameter(name):
            parameters.append(name)
        elif facts.has_routed_experts and name.rpartition(".")[2] in _LIKE_EXPERTS:
            parameters.append(f"{name}.weight")
    as_parameters = {name.removesuffix(".weight") for name in parameters}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": state.spec.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": [name for name in state.target_modules if name not in as_parameters],
        "target_parameters": parameters or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def write(directory: Path, state: AdapterState, base_model: str, facts: ExportFacts = PLAIN_MODEL) -> None:
    """Write an adapter into an existing directory.

    Args:
        base_model: what PEFT should record as the base model.
        facts: of that base model.
    """
    config = json.dumps(peft_config(state, base_model, facts), indent=2)
    (directory / CONFIG).write_text(config, encoding="utf-8")
    (directory / README).write_text(model_card(state.spec, base_model, facts), encoding="utf-8")
    # Transformers and PEFT mark files in PyTorch's layout this way.
    metadata = {"format": "pt"}
    if facts.serving_class is not None:
        metadata |= {SERVING_CLASS: facts.serving_class, SERVING_NAMES: json.dumps(facts.renamed)}
    names = _file_names(state.target_modules)
    weights = _contiguous({names[name]: array for name, array in state.weights.items()})
    safetensors_numpy.save_file(weights, directory / WEIGHTS, metadata=metadata)
    if state.optimizer is not None:
        moments = {f"exp_avg.{names[name]}": array for name, array in state.optimizer.exp_avg.items()}
        moments |= {f"exp_avg_sq.{names[name]}": array for name, array in state.optimizer.exp_avg_sq.items()}
        metadata = {"format": "pt", "step": str(state.optimizer.step)}
        safetensors_numpy.save_file(_contiguous(moments), directory / OPTIMIZER, metadata=metadata)


def read(directory: Path, with_optimizer: bool) -> AdapterState:
    """Read what `write` or PEFT wrote.

    Args:
        with_optimizer: whether to read the optimizer's state.

    Raises:
        InvalidRequest: if a file is missing or invalid, or the optimizer's state was not saved.
    """
    config = _read_config(directory / CONFIG)
    in_file, _ = _read_tensors(directory / WEIGHTS)
    rank, alpha = _rank_and_alpha(config)
    modules, parameters = _check_matrices(in_file), _target_parameters(config)
    targets = [_target(module, modules, parameters) for module in modules]
    names = {file_name: name for name, file_name in _file_names(targets).items()}
    weights = {names[name]: array for name, array in in_file.items()}
    _check_ranks(weights, targets, rank)
    groups = {module_group(target) for target in targets}
    spec = AdapterSpec(
        rank=rank,
        alpha=alpha,
        train_attn="attn" in groups,
        train_mlp="mlp" in groups,
        train_unembed="unembed" in groups,
    )
    optimizer = _read_optimizer(directory / OPTIMIZER, weights, names) if with_optimizer else None
    return AdapterState(spec, targets, weights, optimizer)


def _file_names(targets: Collection[str]) -> dict[str, str]:
    """For the name of each matrix in a state, the one in PEFT's file."""
    first, last = EXPERT_PARAMETERS
    names: dict[str, str] = {}
    for target in targets:
        where = target
        if is_expert_parameter(target):
            where, _, parameter = target.rpartition(".")
            if parameter == first and f"{where}.{last}" in targets:
                where += _WRAPPED
        names |= zip(peft_names(target), peft_names(where), strict=True)
    return names


def _target(module: str, modules: Collection[str], parameters: Sequence[str]) -> str:
    """What the matrices of a module in PEFT's file act on: the module itself, or an experts' parameter of it.

    Args:
        modules: all that have matrices.
        parameters: `target_parameters`: each a parameter's full name, or its end.

    Raises:
        InvalidRequest: if wrappers are nested other than around experts' parameters that are targets.
    """
    first, last = EXPERT_PARAMETERS
    if module.endswith(_WRAPPED):
        target = f"{module.removesuffix(_WRAPPED)}.{first}"
    elif f"{module}{_WRAPPED}" in modules:
        target = f"{module}.{last}"
    else:
        own = [f"{module}.{name}" for name in EXPERT_PARAMETERS]
        return next((name for name in own if _ends_with_one(name, parameters)), module)
    if not is_expert_parameter(target) or not _ends_with_one(target, parameters):
        raise InvalidRequest(
            f"{WEIGHTS}: the matrices of {module} would be of {target}, which is not among {CONFIG}'s "
            "target_parameters, or is no parameter of routed experts"
        )
    return target


def _ends_with_one(name: str, endings: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def _contiguous(arrays: Mapping[str, Float32Array]) -> dict[str, Array]:
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{CONFIG}: can't be read ({words_of(error)}); an adapter in PEFT's layout has it"
        ) from error
    if not isinstance(config, dict):
        raise InvalidRequest(f"{CONFIG}: must be a JSON object")
    config = cast("dict[str, Any]", config)
    for name, unused in _UNUSED.items():
        if config.get(name, unused[0]) not in unused:
            raise InvalidRequest(
                f"{CONFIG}: {name} = {config[name]!r} is not supported here; only plain LoRA adapters can be loaded"
            )
    return config


def _rank_and_alpha(config: Mapping[str, Any]) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise InvalidRequest(f"{CONFIG}: r = {rank!r}; it must be a whole number above 0")
    if not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise InvalidRequest(f"{CONFIG}: lora_alpha = {alpha!r}; it must be a number above 0")
    return rank, float(alpha)


def _target_parameters(config: Mapping[str, Any]) -> list[str]:
    found = cast("object", config.get("target_parameters") or [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in cast("list[object]", found)):
        raise InvalidRequest(f"{CONFIG}: target_parameters = {found!r}; it must be a list of names, or null")
    return cast("list[str]", found)


def _read_tensors(path: Path) -> tuple[dict[str, Float32Array], dict[str, str]]:
    """All tensors of a file, and its metadata."""
    try:
        with cast("Any", safe_open)(path, framework="numpy") as file:
            names = cast("list[str]", list(file.keys()))
            arrays = {name: cast("Array", file.get_tensor(name)) for name in names}
            metadata = cast("dict[str, str]", file.metadata() or {})
    except (OSError, SafetensorError, TypeError) as error:
        # A TypeError is a dtype that numpy lacks, such as bfloat16.
        raise InvalidRequest(
            f"{path.name}: can't be read ({words_of(error)}); it must be safetensors of float32"
        ) from error
    return {name: _as_float32(name, array, path.name) for name, array in arrays.items()}, metadata


def _as_float32(name: str, array: Array, file: str) -> Float32Array:
    if array.dtype.name not in ("float32", "float16"):
        raise InvalidRequest(f"{file}: {name} is {array.dtype}; save the adapter as float32")
    return array.astype(np.float32, copy=False)


def _check_matrices(weights: Mapping[str, Array]) -> list[str]:
    """The modules with matrices, in the order of the file's names.

    Raises:
        InvalidRequest: if there is anything but one matrix A and one B for each module.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, array in weights.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidRequest(f"{WEIGHTS}: {name} is neither lora_A nor lora_B of a linear layer")
        shapes.setdefault(match["module"], {})[match["matrix"]] = array.shape
    if not shapes:
        raise InvalidRequest(f"{WEIGHTS}: it holds no matrices")
    for module, found in shapes.items():
        if set(found) != {"A", "B"} or len(found["A"]) != 2 or len(found["B"]) != 2:
            raise InvalidRequest(f"{WEIGHTS}: {module} must have one matrix lora_A and one lora_B")
    return list(shapes)


def _check_ranks(weights: Mapping[str, Array], targets: Sequence[str], rank: int) -> None:
    """
    Raises:
        InvalidRequest: if a target's matrices are not A [rank, in] and B [out, rank], with the ranks of all experts in
            sequence.
    """
    for target in targets:
        a, b = (weights[f"base_model.model.{target}.lora_{matrix}.weight"].shape for matrix in "AB")
        ranks = a[0] if is_expert_parameter(target) and a[0] and a[0] % rank == 0 else rank
        if (a[0], b[1]) != (ranks, ranks):
            raise InvalidRequest(
                f"{WEIGHTS}: {target} has A {list(a)} and B {list(b)}, but {CONFIG} says rank {rank}"
            )


def _read_optimizer(
    path: Path, weights: Mapping[str, Float32Array], names: Mapping[str, str]
) -> OptimizerState:
    """`weights` are named as in a state; `names` maps the names in PEFT's file to these."""
    if not path.is_file():
        raise InvalidRequest(
            "this checkpoint has no optimizer state: it was saved for sampling, or by PEFT; "
            "load it without the optimizer"
        )
    arrays, metadata = _read_tensors(path)
    step = metadata.get("step", "")
    if not step.isdecimal():
        raise InvalidRequest(f"{OPTIMIZER}: its metadata must have a step, a whole number; found {step!r}")
    moments = {
        kind: {
            names.get(file_name := name.removeprefix(f"{kind}."), file_name): array
            for name, array in arrays.items()
            if name.startswith(f"{kind}.")
        }
        for kind in ("exp_avg", "exp_avg_sq")
    }
    shapes = {name: array.shape for name, array in weights.items()}
    for kind, matrices in moments.items():
        check_arrays(f"{OPTIMIZER}: {kind}", matrices, shapes)
    return OptimizerState(int(step), moments["exp_avg"], moments["exp_avg_sq"])
