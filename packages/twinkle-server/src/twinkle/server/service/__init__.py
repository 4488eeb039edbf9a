"""The service's face: validates what it is asked, queues it, answers. No HTTP, no torch, no ray."""
