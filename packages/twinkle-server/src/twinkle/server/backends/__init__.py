"""Training backends: what computes log-probabilities, gradients and optimizer steps for many adapters on one model."""
