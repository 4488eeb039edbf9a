"""Direct preference optimisation on comparisons in a local file.

The cookbook's own recipe (tinker_cookbook.recipes.preference.dpo.train) is a command line around the same call, but
knows only data sets of the Hugging Face hub.

    python dpo.py comparisons=comparisons.jsonl model_name=Qwen/Qwen3-8B renderer_name=qwen3 log_path=/some/directory
"""

# tinker-cookbook is in an environment of its own, which the type checker does not see.
# pyright: reportMissingImports=false, reportUntypedClassDecorator=false

import chz
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig


@chz.chz
class CLIConfig:
    comparisons: str
    model_name: str
    renderer_name: str
    log_path: str
    lora_rank: int = 32
    learning_rate: float = 1e-5
    dpo_beta: float = 0.1
    batch_size: int = 4
    max_length: int | None = 2048
    num_epochs: int = 1
    max_steps: int | None = None


def main(options: CLIConfig) -> None:
    dataset_builder = DPODatasetBuilderFromComparisons(
        common_config=ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=options.model_name,
            renderer_name=options.renderer_name,
            max_length=options.max_length,
            batch_size=options.batch_size,
        ),
        comparison_builder=ComparisonBuilderFromJsonl(train_path=options.comparisons),
    )
    train_dpo.main(
        train_dpo.Config(
            log_path=options.log_path,
            model_name=options.model_name,
            recipe_name="dpo_from_comparisons",
            renderer_name=options.renderer_name,
            dataset_builder=dataset_builder,
            lora_rank=options.lora_rank,
            learning_rate=options.learning_rate,
            lr_schedule="constant",
            dpo_beta=options.dpo_beta,
            num_epochs=options.num_epochs,
            max_steps=options.max_steps,
        )
    )


if __name__ == "__main__":
    main(chz.entrypoint(CLIConfig))
