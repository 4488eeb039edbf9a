"""A base model, loaded by Transformers: its files checked, its size, limits and export names found out.

base_folder, base_model    what its files must be; loading it
model_facts, export_facts  what its configuration and the device's memory allow; what other programs call its parts
rope, threads              rows that must not share a call; CPU threads by the work there is
"""
