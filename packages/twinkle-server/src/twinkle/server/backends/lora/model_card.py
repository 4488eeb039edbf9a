"""The README.md of a checkpoint: what it is, how to load it, and what doesn't work with it."""

from __future__ import annotations

from twinkle.server.backends.lora.module_groups import wanted_groups
from twinkle.server.backends.protocol import AdapterSpec, ExportFacts

_GROUPS = {"attn": "attention", "mlp": "feed-forward layers", "unembed": "the output head"}

_TIED = """
## Merging

The output head of the base model is its embedding, and this adapter acts on the head. One matrix can't be both:
`merge_and_unload` changes the embedding too, and the merged model gives other numbers than the adapter. Not merged, it
is exact. To merge it, give the base model a head of its own first:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
head = base.get_output_embeddings()
head.weight = torch.nn.Parameter(head.weight.detach().clone())
base.config.tie_word_embeddings = False
PeftModel.from_pretrained(base, ".").merge_and_unload().save_pretrained("merged")
```

or train with `train_unembed=False`.
"""

_SERVING = """
## Serving

The base model's config.json names {serving_class}, where the layers have other names than in the class that
`AutoModelForCausalLM` makes. vLLM and SGLang go by config.json, and may pass over this adapter without a word. For
them, write it under their names: `twinkle.layouts.convert(".", "serving", "serving")`, or download it with
`layout="serving"`.
"""


def model_card(spec: AdapterSpec, base_model: str, facts: ExportFacts) -> str:
    """Text in Markdown.

    Args:
        base_model: as in `adapter_config.json`.
        facts: of that base model.
    """
    groups = wanted_groups(spec)
    acts_on = ", ".join(text for group, text in _GROUPS.items() if group in groups)
    lines = ["---", "library_name: peft", "---", ""]
    if not base_model.startswith("/"):
        lines.insert(1, f"base_model: {base_model}")
    lines += [
        f"# LoRA adapter on {base_model}",
        "",
        f"Rank {spec.rank}, alpha {spec.alpha:g}, on {acts_on}; made with Twinkle.",
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained(".")  # this folder',
        "```",
        "",
    ]
    if facts.has_routed_experts and spec.train_mlp:
        lines += ["Its routed experts need PEFT 0.20 or newer.", ""]
    text = "\n".join(lines)
    if facts.renamed:
        text += _SERVING.format(serving_class=facts.serving_class)
    if facts.tied_head and spec.train_unembed:
        text += _TIED.format(base=base_model)
    return text
