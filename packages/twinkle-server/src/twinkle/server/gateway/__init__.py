"""HTTP in, HTTP out: routes, authentication, encoding, errors. No torch, no ray, no decisions of its own."""
