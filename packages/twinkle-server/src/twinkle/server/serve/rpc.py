"""RPC between two processes of the server: a method's name and arguments one way, its result the other.

Ray starts and kills the processes; calls between them use their own socket, at a twentieth of the cost of a call to a
Ray actor. On one machine it is a Unix socket in a directory that only this user can read, deleted as soon as the caller
has connected; between machines it is TCP. Either way the caller first sends a secret that it got through Ray, and
nothing is unpickled for a caller that doesn't know it.

    frame: number of the call (8 bytes), whether its result is wanted (1), size (8), and that many bytes: pickled
           (method, args, kwargs), or (has succeeded, value). Frames with the number 0 are heartbeats, without a body.

Limits:
- A connection that hasn't sent the whole secret within 10 s is closed. The first one that has is the only caller; then
  the server stops listening.
- Heartbeats are answered by the event loop, so a process that is stopped, or whose interpreter lock is never released,
  answers none: the connection is lost after `heartbeat_seconds`. A frame must cross within that time too.
- A call itself has no deadline: a method that never returns is up to its caller (see `ranks`).
- A caller's unread frames are limited to the answers it waits for. A server whose replies are unread reads no calls.
- Frames have no maximum size: both ends are the same program. Each is held whole in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import pickle
import secrets
import shutil
import struct
import tempfile
import traceback
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from twinkle.protocol.errors import ServerFault

_HEADER = struct.Struct("<q?q")
_HEARTBEAT = 0
_SECRET_BYTES = 32
_SECRET_SECONDS = 10.0
# This many heartbeats in a row must be unanswered. A single one may be, if it was this process that was held up.
_HEARTBEATS = 6
# A tick's rows are some hundred kilobytes: a reader that is paused less often is woken less often.
_BUFFER_BYTES = 4 * 2**20


class ConnectionLost(ConnectionError):
    """The other process has ended, answers no heartbeats, or was hung up on. The text says which."""


@dataclass(frozen=True)
class Address:
    """Where a process takes calls.

    Attributes:
        socket: path of a Unix socket; None between machines.
        secret: what the caller must send first.
    """

    socket: str | None
    host: str
    port: int
    secret: bytes


@dataclass(frozen=True)
class Call:
    """A method's name and arguments; pickled once, however many processes it is sent to."""

    method: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def body(self) -> bytes:
        return pickle.dumps((self.method, self.args, self.kwargs), pickle.HIGHEST_PROTOCOL)


# ---------------------------------------------------------------- the side that is called


class Server:
    """Runs async methods of one object for one caller until it hangs up, on the event loop that it listens on."""

    address: Address
    _listener: asyncio.Server

    def __init__(self, target: asyncio.Future[Any]) -> None:
        """
        Args:
            target: the object, once it exists: calls wait for it, and raise what it failed with.
        """
        self._target = target

    async def listen(self, host: str | None) -> Address:
        """
        Args:
            host: this machine's address, for a caller on another one; None for a caller on this machine.
        """
        secret = secrets.token_bytes(_SECRET_BYTES)
        if host is None:
            path = Path(tempfile.mkdtemp(prefix="twinkle-")) / "calls"
            self._listener = await asyncio.start_unix_server(self._connected, path, limit=_BUFFER_BYTES)
            self.address = Address(str(path), "", 0, secret)
        else:
            self._listener = await asyncio.start_server(self._connected, host, 0, limit=_BUFFER_BYTES)
            self.address = Address(None, host, self._listener.sockets[0].getsockname()[1], secret)
        return self.address

    def close(self) -> None:
        """Stop listening; a connected caller is still answered."""
        self._listener.close()
        if self.address.socket is not None:
            shutil.rmtree(Path(self.address.socket).parent, ignore_errors=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECRET_SECONDS):
                said = await reader.readexactly(_SECRET_BYTES)
            if hmac.compare_digest(said, self.address.secret):
                self.close()
                await self._answer_calls(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass  # the caller has hung up, or isn't ours: there is nobody to tell
        finally:
            writer.close()

    async def _answer_calls(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering: set[asyncio.Task[None]] = set()
        while True:
            number, wants_result, body = await _read_frame(reader)
            # Flow control: no more calls are taken until the caller has read the replies to earlier ones.
            await writer.drain()
            if number == _HEARTBEAT:
                _write_frame(writer, _HEARTBEAT)
                continue
            task = asyncio.create_task(self._answer(number, wants_result, body, writer))
            answering.add(task)
            task.add_done_callback(answering.discard)

    async def _answer(
        self, number: int, wants_result: bool, body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        try:
            method, args, kwargs = pickle.loads(body)
            value = await getattr(await self._target, method)(*args, **kwargs)
            reply = pickle.dumps((True, value if wants_result else None), pickle.HIGHEST_PROTOCOL)
        except (
            asyncio.CancelledError
        ):  # nobody cancels this task: what was cancelled is the sample it waited for
            reply = _dump_error(ServerFault("the sample was cancelled"))
        except Exception as error:
            reply = _dump_error(error)
        _write_frame(writer, number, reply)


def _dump_error(error: Exception) -> bytes:
    """Pickle an error with its traceback as a note, for the caller's log."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        reply = pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)
        pickle.loads(reply)  # some exceptions can be pickled but not unpickled
    except Exception:  # its own methods may raise anything: the caller gets the text and the note instead
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(error.__notes__[-1])
        reply = pickle.dumps((False, plain), pickle.HIGHEST_PROTOCOL)
    return reply


# ---------------------------------------------------------------- the side that calls


class Connection:
    """A connection to a `Server`. Single-threaded: used on one event loop."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heartbeat_seconds: float
    ) -> None:
        self._writer = writer
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._calls = 0
        self._heartbeat_seconds = heartbeat_seconds
        self._unanswered = 0
        self._lost: asyncio.Future[ConnectionLost] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._read(reader)), asyncio.create_task(self._send_heartbeats())]

    @classmethod
    async def connect(cls, address: Address, heartbeat_seconds: float) -> Connection:
        """
        Args:
            heartbeat_seconds: the connection is lost when the other process has answered no heartbeat for this long.

        Raises:
            OSError: if nothing listens there.
        """
        if address.socket is not None:
            streams = await asyncio.open_unix_connection(address.socket, limit=_BUFFER_BYTES)
        else:
            streams = await asyncio.open_connection(address.host, address.port, limit=_BUFFER_BYTES)
        streams[1].write(address.secret)
        return cls(*streams, heartbeat_seconds)

    def call(self, call: Call, wants_result: bool = True) -> asyncio.Future[Any]:
        """Send a call; calls begin in the order in which they are sent.

        Returns:
            What the method returns or raises, or `ConnectionLost`; None if its result isn't wanted. An exception that
            is never retrieved isn't logged.
        """
        answer = asyncio.get_running_loop().create_future()
        if self._lost.done():
            _fail(answer, self._lost.result())
        else:
            self._calls += 1
            _write_frame(self._writer, self._calls, call.body, wants_result)
            self._answers[self._calls] = answer
        return answer

    async def lost(self) -> ConnectionLost:
        """Wait until the connection is lost; returns why."""
        return await asyncio.shield(self._lost)

    def close(self) -> None:
        self._lose(ConnectionLost("it was closed"))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                number, _, body = await _read_frame(reader)
                self._unanswered = 0
                answer = self._answers.pop(number, None)
                if answer is not None and not answer.done():  # its caller may have given up
                    _settle(answer, body)
        self._lose(ConnectionLost("its process ended, or the connection to it broke"))

    async def _send_heartbeats(self) -> None:
        while self._unanswered < _HEARTBEATS:
            self._unanswered += 1
            _write_frame(self._writer, _HEARTBEAT)
            await asyncio.sleep(self._heartbeat_seconds / _HEARTBEATS)
        self._lose(ConnectionLost(f"no heartbeat for {self._heartbeat_seconds:g} s"))

    def _lose(self, reason: ConnectionLost) -> None:
        if self._lost.done():
            return
        self._lost.set_result(reason)
        for task in self._tasks:
            task.cancel()
        # Not `close`, which would wait for a stopped process to read what was sent to it.
        self._writer.transport.abort()
        for answer in self._answers.values():
            if not answer.done():
                _fail(answer, reason)


def _settle(answer: asyncio.Future[Any], body: bytes) -> None:
    try:
        succeeded, value = pickle.loads(body)
    except Exception as error:  # the value's own methods may raise anything
        succeeded, value = False, error
    if succeeded:
        answer.set_result(value)
    else:
        _fail(answer, value)


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    answer.set_exception(error)
    # Otherwise asyncio would log, as never retrieved, the errors of ranks that nobody waits for any more.
    answer.exception()


# ---------------------------------------------------------------- both


def _write_frame(
    writer: asyncio.StreamWriter, number: int, body: bytes = b"", wants_result: bool = False
) -> None:
    writer.write(_HEADER.pack(number, wants_result, len(body)))
    writer.write(body)


async def _read_frame(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    number, wants_result, size = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    return number, wants_result, await reader.readexactly(size)
