"""A base model, loaded by Transformers: checks of its files, its size, limits and export names.

base_folder, base_model    what its files must be; loading it
model_facts, export_facts  what its configuration and the device's memory allow; other programs' names for its parts
kernels, kernel_packages   which code computes the layers; packages with kernels for GPUs
rope, threads              rows that must not share a call; CPU threads by the amount of work
"""
