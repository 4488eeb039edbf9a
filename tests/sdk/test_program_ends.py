"""A program that ends while the server answers it ends with exit code 0.

Before Python 3.14 an interpreter that ends also ends any other thread that comes back to it, and if such a thread came
out of Rust, the process aborts. The SDK has a transport with such threads, and a server says whether it is used.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tinker_sdk import MODEL

PROGRAM = """
import threading
import time
from asyncio.selector_events import BaseSelectorEventLoop

from tinker import ServiceClient, types

answering = threading.Event()
wake_up = BaseSelectorEventLoop._write_to_self


class EndsSlowly:
    # Globals are cleared when the interpreter has begun to end.
    def __del__(self, sleep=time.sleep):
        sleep(2.0)


def wake_up_slowly(loop):
    # A thread that isn't Python's tells the loop of a reply. It comes back while the interpreter ends.
    if watched and isinstance(threading.current_thread(), threading._DummyThread):
        answering.set()
        time.sleep(0.5)
    wake_up(loop)


watched = False
BaseSelectorEventLoop._write_to_self = wake_up_slowly
service_client = ServiceClient(base_url={base_url!r}, api_key="tml-ends-early")
created = service_client.create_sampling_client(base_model={model!r})
sampling_client = created.result() if hasattr(created, "result") else created  # newer SDKs: a future
watched = True
params = types.SamplingParams(max_tokens=4)
sampled = sampling_client.sample(types.ModelInput.from_ints([1, 2, 3]), num_samples=1, sampling_params=params)
answering.wait(3.0)
ends_slowly = EndsSlowly()
print("all said", flush=True)
"""


def test_with_replies_under_way(base_url: str):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(base_url=base_url, model=MODEL)],
        env={**os.environ, "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "all said\n", done.stderr
    assert done.returncode == 0, done.stderr
