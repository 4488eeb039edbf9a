"""Sampling engines: what generates tokens for many adapters on one model."""
