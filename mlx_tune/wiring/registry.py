"""Who wants how much wired, and the one limit that follows from it. This file does not know MLX."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WiredRequest:
    """The memory that one live `with` wants resident.

    Attributes:
        arrays: The bytes of each array. An array that several requests name under the same key counts once.
        headroom: The share of the arrays' bytes to add for what computing with them makes.
        extra_bytes: Bytes asked for outright; added to everybody else's.
        keys: Whatever has to live as long as the request for its arrays' keys to stay true.
    """

    arrays: Mapping[Any, int] = field(default_factory=dict)
    headroom: float = 0.0
    extra_bytes: int = 0
    keys: tuple[object, ...] = ()


def total_bytes(requests: Iterable[WiredRequest]) -> int:
    """The memory that all requests together want resident.

    Each distinct array counts once, with the largest headroom that any request gives it; bytes asked for outright
    add up.

    Examples:
        >>> model = WiredRequest(arrays={"weight": 100}, headroom=0.2)
        >>> total_bytes([model, model, WiredRequest(extra_bytes=5)])
        125
    """
    extra = 0
    by_headroom: dict[float, list[WiredRequest]] = {}
    for request in requests:
        extra += request.extra_bytes
        by_headroom.setdefault(request.headroom, []).append(request)
    # The largest headroom first: an array that was counted under it is not counted again.
    seen: dict[object, int] = {}
    total = 0
    for headroom in sorted(by_headroom, reverse=True):
        before = sum(seen.values())
        for request in by_headroom[headroom]:
            seen = {**request.arrays, **seen} if seen else dict(request.arrays)
        added = sum(seen.values()) - before
        total += added + math.floor(added * headroom)
    return extra + total


def rule(requests: Iterable[WiredRequest], baseline_bytes: int, cap_bytes: int) -> int:
    """The limit that has to hold while these requests are live: `min(cap, max(baseline, total))`.

    Examples:
        >>> rule([WiredRequest(extra_bytes=30)], baseline_bytes=10, cap_bytes=20)
        20
    """
    return min(cap_bytes, max(baseline_bytes, total_bytes(requests)))


class Registry:
    """The live requests of a process, and the limit kept in step with them.

    Whatever the order, thread or task in which requests come and go, the limit equals `rule`, and the baseline
    (what was set before the first) returns with the last. If somebody else lowers the limit below the baseline in
    the meantime, that is the new baseline: an outsider that came before the first request has left, and its
    limit must not come back. A limit that somebody else raised is not kept.

    The lock is held while the limit is set and the cache cleared, neither of which waits for the device. A
    request that ends because the garbage collector found it may arrive in the middle of either, in the same
    thread: it is noted, and done with when the work at hand is.

    Args:
        set_limit: Sets the limit in bytes and returns the previous one, as `mx.set_wired_limit` does.
        clear_cache: Gives cached buffers back, so that the room made by a raised limit goes to live arrays.
        settled: Told what the live requests' limit is each time that it may have changed; 0 without any.
    """

    def __init__(
        self,
        set_limit: Callable[[int], int],
        clear_cache: Callable[[], None],
        settled: Callable[[int], None] = lambda limit: None,
    ) -> None:
        """Start with no request; nothing is set."""
        self._set_limit = set_limit
        self._clear_cache = clear_cache
        self._settled = settled
        self._lock = threading.RLock()
        self._tokens = itertools.count()
        self._requests: dict[int, WiredRequest] = {}
        self._left: list[int] = []
        self._settling = False
        self._baseline: int | None = None  # None while nobody has changed the limit
        self._limit = 0
        self._cap = 0

    @property
    def live(self) -> int:
        """The number of live requests."""
        return len(self._requests)

    @property
    def limit_bytes(self) -> int:
        """The limit that holds while requests are live, as last set here."""
        return self._limit

    def make_token(self) -> int:
        """A name for a request that is about to be made."""
        return next(self._tokens)

    def enter(
        self, token: int, request: WiredRequest, cap_bytes: int, allow: Callable[[int], int] | None = None
    ) -> int:
        """Add a request and raise the limit to what the rule says.

        Args:
            token: From `make_token`, for `leave`.
            request: The request.
            cap_bytes: The most this machine may wire, as read now.
            allow: Given what all requests together want, says how much of it they may have: the cap from then on.

        Returns:
            The limit that now holds.

        Raises:
            Exception: Whatever `set_limit` or `allow` raises; the request is then out again.
        """
        with self._lock:
            if allow is not None:
                cap_bytes = allow(rule([*self._requests.values(), request], self._baseline or 0, cap_bytes))
            self._cap = cap_bytes
            self._requests[token] = request
            try:
                self._settle()
            except BaseException:
                self._requests.pop(token, None)
                self._settle()
                raise
            return self._limit

    def hold(self) -> None:
        """Set the limit that follows from the live requests once more, after somebody else has set his own."""
        with self._lock:
            self._settle()

    def leave(self, token: int) -> None:
        """Take a request out and lower the limit to what the rule says. One that is not in changes nothing."""
        with self._lock:
            self._left.append(token)
            self._settle()

    def _drop_left(self) -> None:
        while self._left:
            self._requests.pop(self._left.pop(), None)

    def _settle(self) -> None:
        # A collector that runs in here may call `leave`. Looking again after the flag is down misses none.
        while not self._settling:
            self._settling = True
            try:
                self._drop_left()
                self._follow_rule()
            finally:
                self._settling = False
            self._settled(self._limit if self._requests else 0)
            if not self._left:
                return

    def _follow_rule(self) -> None:
        requests = list(self._requests.values())
        if requests:
            self._change(rule(requests, self._baseline or 0, self._cap))
            limit = rule(requests, self._baseline or 0, self._cap)
            if limit != self._limit:  # the change has told another baseline
                self._change(limit)
        elif self._baseline is not None:
            self._change(self._baseline)
            if self._limit != self._baseline:
                self._change(self._baseline)
            self._baseline = None

    def _change(self, limit: int) -> None:
        """Set the limit, and learn from the one it replaces: MLX has no getter."""
        if self._baseline is None or limit > self._limit:
            self._clear_cache()
        previous = self._set_limit(limit)
        if self._baseline is None:
            self._baseline = previous
        elif previous != self._limit:
            self._baseline = min(self._baseline, previous)
        self._limit = limit
