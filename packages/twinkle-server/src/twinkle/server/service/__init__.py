"""The service: validates requests, queues and answers them. No HTTP, no torch, no ray."""
