"""Saved checkpoints: writing, finding, reading and deleting them, and the quotas on them. No jobs, no worker."""
