"""From jobs to results: packs what a tick holds into micro-batches, runs them, completes their futures."""
