"""How fast a server serves: load over the wire, bare loops in one process, and the ratios of both."""
