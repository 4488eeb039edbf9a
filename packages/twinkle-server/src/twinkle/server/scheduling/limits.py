"""Limits for each tenant and for all together: what may be queued, and at what rate more is accepted."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twinkle.protocol.errors import LimitReached, QuotaReached
from twinkle.server.config import LimitsSection
from twinkle.server.scheduling.futures import Load

# Results arrive at any moment; a longer Retry-After would leave the server idle.
_ROOM_SECONDS = 2.0
_MAX_RETRY_SECONDS = 30.0
# Tenants whose buckets are checked when another is added.
_LOOKED_AT = 2


@dataclass
class _Bucket:
    """A token bucket: its level, and when it had that."""

    level: float
    at: float


class RateLimit:
    """Token buckets, one for each tenant and one for all. One that is overdrawn admits nothing until it has refilled.

    A request is admitted before its cost is known, so a bucket can be overdrawn, by one request of any size.
    Single-threaded.
    """

    def __init__(
        self,
        name: str,
        per_tenant: float | None,
        in_all: float | None,
        seconds: float,
        clock: Callable[[], float],
        burst: float = 1.0,
    ) -> None:
        """
        Args:
            name: the limit's name in the configuration; that of a single tenant ends in `_per_tenant`.
            per_tenant: most in `seconds`; None: no limit.
            burst: how many times that may be used at once after a pause.
        """
        self._name = name
        self._per_tenant = per_tenant
        self._in_all = in_all
        self._seconds = seconds
        self._clock = clock
        self._burst = burst
        self._tenants: OrderedDict[str, _Bucket] = OrderedDict()  # least recently charged first
        self._all = _Bucket((in_all or 0) * burst, clock())

    def check(self, tenant: str) -> None:
        """
        Raises:
            LimitReached: if the tenant, or all together, have used up their allowance for now.
        """
        if self._in_all is not None:
            self._check(self._name, self._all, self._in_all)
        if self._per_tenant is not None and tenant in self._tenants:
            self._check(f"{self._name}_per_tenant", self._tenants[tenant], self._per_tenant)

    def charge(self, tenant: str, amount: float) -> None:
        if self._in_all is not None:
            self._charge(self._all, self._in_all, amount)
        if self._per_tenant is not None:
            bucket = self._tenants.get(tenant)
            if bucket is None:
                self._forget_full()
                bucket = self._tenants[tenant] = _Bucket(self._per_tenant * self._burst, self._clock())
            self._charge(bucket, self._per_tenant, amount)
            self._tenants.move_to_end(tenant)

    def _check(self, name: str, bucket: _Bucket, limit: float) -> None:
        self._charge(bucket, limit, 0)
        if bucket.level <= 0:
            wait = (1 - bucket.level) * self._seconds / limit
            raise LimitReached(
                f"limits.{name}: {limit:g} is the most that this server takes; try again in {wait:.1f} s",
                min(max(wait, 0.1), _MAX_RETRY_SECONDS),
            )

    def _charge(self, bucket: _Bucket, limit: float, amount: float) -> None:
        now = self._clock()
        earned = (now - bucket.at) * limit / self._seconds
        bucket.level = min(bucket.level + earned, limit * self._burst) - amount
        bucket.at = now

    def _forget_full(self) -> None:
        """Check two of the oldest for each new one, so that only recently charged ones are kept."""
        assert self._per_tenant is not None, "there are buckets only where there is a limit"
        for tenant in list(itertools.islice(self._tenants, _LOOKED_AT)):
            bucket = self._tenants[tenant]
            self._charge(bucket, self._per_tenant, 0)
            if bucket.level >= self._per_tenant * self._burst:
                del self._tenants[tenant]


def check_submission(
    limits: LimitsSection,
    own: Load,
    in_all: Load,
    rate: RateLimit,
    tenant: str,
    tokens: int,
    always_room: bool = False,
) -> None:
    """
    Args:
        own, in_all: loads of the tenant and of all tenants.
        always_room: queue it whatever else the tenant has queued, because that waits for this request.

    Raises:
        LimitReached: if a request of this many tokens can't be accepted now.
    """
    check_fetched(limits, own)
    if not always_room:
        check_room(limits, own, in_all, tokens)
    if tokens:
        rate.check(tenant)


def check_fetched(limits: LimitsSection, own: Load) -> None:
    """
    Raises:
        LimitReached: if the tenant has too many unfetched results.
    """
    unfetched, most = own.unfetched_bytes, limits.max_unfetched_bytes_per_tenant
    if most is not None and unfetched > most:
        raise LimitReached(
            f"limits.max_unfetched_bytes_per_tenant: results of {unfetched} bytes wait to be fetched, and this server "
            f"keeps {most}; fetch them first (retrieve_future)",
            _ROOM_SECONDS,
        )


def check_room(limits: LimitsSection, own: Load, in_all: Load, tokens: int) -> None:
    """
    Args:
        tokens: of the request to be queued. A tenant with nothing queued may always queue one, however large.

    Raises:
        LimitReached: if there is no room for it now.
    """
    if not own.requests:
        return
    for name, load, limit, more in (
        ("max_queued_requests_per_tenant", own.requests, limits.max_queued_requests_per_tenant, 1),
        ("max_queued_tokens_per_tenant", own.tokens, limits.max_queued_tokens_per_tenant, tokens),
        ("max_queued_requests", in_all.requests, limits.max_queued_requests, 1),
        ("max_queued_tokens", in_all.tokens, limits.max_queued_tokens, tokens),
    ):
        if limit is not None and load + more > limit:
            raise LimitReached(
                f"limits.{name}: {load} are queued and {more} more asked for, but {limit} is the most that this "
                "server keeps; it is taken once some of them are done",
                _ROOM_SECONDS,
            )


def check_runs(limits: LimitsSection, tenants: Sequence[str], tenant: str) -> None:
    """
    Args:
        tenants: the tenant of each live run.

    Raises:
        QuotaReached: if the tenant can't have one more run.
    """
    for name, there_are, limit in (
        ("max_runs_per_tenant", tenants.count(tenant), limits.max_runs_per_tenant),
        ("max_runs", len(tenants), limits.max_runs),
    ):
        if limit is not None and there_are >= limit:
            raise QuotaReached(
                f"limits.{name}: {there_are} training runs take requests, and this server allows {limit}; end one "
                "first (unload_model, or the end of its session)"
            )
