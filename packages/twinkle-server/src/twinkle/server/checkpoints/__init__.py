"""Saved checkpoints: writing, finding, reading and deleting them, and their quotas. No jobs, no worker."""
