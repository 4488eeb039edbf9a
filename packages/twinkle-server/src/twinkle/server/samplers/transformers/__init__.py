"""The Transformers sampling engine: continuous batching of many adapters on one base model, CPU or GPU."""

from twinkle.server.samplers.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]
