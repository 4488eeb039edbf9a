"""From jobs to results: packs a tick's rows into micro-batches, runs them, completes the futures."""
