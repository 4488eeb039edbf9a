"""LoRA adapters, whatever holds the base model: what they are, where they live, how they compute, step and are saved.

module_groups, adapter_state, finite               rules that need no torch
peft_format, model_card                            an adapter as files
banks, scratch, adapters, adamw                    where adapters live, their gradients and steps
linear, experts                                    low-rank terms on linear layers and routed experts
transfer                                           from the host to a GPU without waiting
losses/                                            log-probabilities, losses, checks of rows
"""
