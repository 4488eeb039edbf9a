"""The contract of sampling engines, by vLLM."""

from sampling_contract import *  # noqa: F403
from vllm_engines import require_vllm

require_vllm()
