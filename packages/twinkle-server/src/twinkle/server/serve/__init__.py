"""Ray Serve: which processes there are and how they reach each other. The only package that imports ray."""
