"""What runs when: ordered queues, fairness between tenants, ticks and futures. No HTTP, no torch, no ray."""
