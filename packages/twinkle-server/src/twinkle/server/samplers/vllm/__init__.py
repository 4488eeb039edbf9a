"""vLLM as the sampling engine: in processes of its own, in an environment of its own where versions conflict.

engine       the `SamplingEngine`: its thread, its adapters, futures
loop         what waits and what runs, on the thread's event loop
admission    who is next: vLLM's own queue is first come, first served, so it is kept empty
requests     the wire's parameters to vLLM's, and its outputs back
prompts      what is asked about prompts
adapters     adapters as files that vLLM loads
launch       settings, and starting vLLM
served       what the model's configuration says about it
worker       what is changed in vLLM's own processes
api          the names that are taken from vLLM, imported when the engine starts
"""

from twinkle.server.samplers.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
