"""Whether two requests ask for the same, however each of them was encoded, compressed or sent."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel

from twinkle.protocol import messages as m
from twinkle.protocol.types import EncodedTextChunk, ModelInput

# What may differ between a request and the same one sent again: the gateway signs tokens anew.
_NOT_COMPARED = {"weights_access_token"}


def digest(request: m.Operation) -> bytes:
    """16 bytes: the same for the same request, whatever process asks. Empty is never returned."""
    found = hashlib.blake2b(digest_size=16)
    if isinstance(request, m.ForwardBackwardRequest):
        config = sorted(request.loss_fn_config.items())
        found.update(repr((request.loss_fn, request.forward_only, len(request.data), config)).encode())
        for datum in request.data:
            _add_tokens(found, datum.model_input)
            for name, tensor in sorted(datum.loss_fn_inputs.items()):
                found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                found.update(tensor.array.tobytes())
    elif isinstance(request, m.SampleRequest):
        _add_tokens(found, request.prompt)
        found.update(_text(request, {"prompt"}))
    else:
        found.update(_text(request, _NOT_COMPARED))
    return found.digest()


def _text(request: BaseModel, besides: set[str]) -> bytes:
    """Without what is as it is when nothing is said: a later version of the server, which knows more fields, has to
    find the same.
    """
    return request.model_dump_json(exclude=besides, exclude_defaults=True).encode()


def _add_tokens(found: hashlib.blake2b, text: ModelInput) -> None:
    for chunk in text.chunks:
        found.update(f"{chunk.type} ".encode())
        if isinstance(chunk, EncodedTextChunk):
            found.update(f"{len(chunk.tokens)} ".encode())
            found.update(chunk.tokens.tobytes())
