"""The contract of sampling engines, by vLLM."""

from sampling_contract import *  # noqa: F403
from vllm_engines import needs_vllm

pytestmark = needs_vllm
