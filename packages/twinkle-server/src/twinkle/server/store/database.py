"""All queries, as methods on typed rows. Blocking: callers on an event loop use a thread."""

from twinkle.server.store.account_rows import AccountRows
from twinkle.server.store.checkpoint_rows import CheckpointRows
from twinkle.server.store.engine_rows import EngineRows
from twinkle.server.store.session_rows import SessionRows


class Database(SessionRows, CheckpointRows, AccountRows, EngineRows):
    """Queries by groups of tables, on one connection. Every look-up names the tenant: another tenant's rows are not
    found, unless a method says that it also finds published ones.
    """
