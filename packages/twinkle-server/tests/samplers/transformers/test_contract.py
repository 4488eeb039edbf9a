"""The contract of sampling engines, by the Transformers engine."""

from sampling_contract import *  # noqa: F403
