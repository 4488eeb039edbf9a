"""Starts a server on the Megatron backend. Ctrl-C ends it and everything that it started.

    python cookbook/client/server/megatron/server.py                         # as server_config.yaml beside it says
    python cookbook/client/server/megatron/server.py server_config_cpu.yaml  # a tiny model, two ranks on a CPU

Needs 'twinkle-server[megatron]'. When it says that it listens, run a program of `cookbook/client/twinkle` or of
`cookbook/client/tinker` in another terminal, and name the configuration's model to it: `--base-model Qwen/Qwen3-14B`.
"""

import sys
from pathlib import Path

from twinkle.server import TwinkleServer

config = Path(sys.argv[1] if len(sys.argv) > 1 else "server_config.yaml")
# A name alone means the file beside this one.
server = TwinkleServer.from_config(config if config.is_file() else Path(__file__).parent / config)
server.run()
