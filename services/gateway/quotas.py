"""What each principal may use in a minute. Every gateway replica counts by itself."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from services.runtime.errors import Overloaded
from services.runtime.gate import Caller

MINUTE = 60.0
FORGOTTEN_AT_ONCE = 2  # more than come in by a call, so that the idle ones never add up


@dataclass(frozen=True)
class Limits:
    """Of one principal: in a minute, and streams at once. 0 has no limit."""

    requests: int = 0
    tokens: int = 0
    streams: int = 0
    bytes: int = 0


class Bucket:
    """Holds what may be used in a minute and refills evenly. What is used last may be more than
    was left: then nothing more may be until that is made up for. `size` 0 has no limit."""

    def __init__(self, reason: str, what: str, size: int, clock: Callable[[], float]) -> None:
        self._reason = reason
        self._what = what
        self._size = size
        self._clock = clock
        self._left = float(size)
        self._since = clock()

    def check(self) -> None:
        """Raise Overloaded (the reason of this bucket) if nothing may be used now."""
        if self._size and self._refilled() < 1:
            seconds = (1 - self._left) * MINUTE / self._size
            said = f"the quota of {self._size} {self._what} a minute is used up"
            error = Overloaded(self._reason, f"{said}; try again in {math.ceil(seconds)} s")
            error.retry_after = math.ceil(seconds * 1e3) / 1e3
            raise error

    def use(self, amount: float) -> None:
        """Take out, even what is not there."""
        if self._size:
            self._left = self._refilled() - amount

    def full(self) -> bool:
        return self._refilled() >= self._size

    def _refilled(self) -> float:
        now = self._clock()
        self._left = min(self._size, self._left + (now - self._since) * self._size / MINUTE)
        self._since = now
        return self._left


class Account:
    """What one principal has used."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.requests = Bucket("QUOTA_REQUESTS", "requests", limits.requests, clock)
        self.tokens = Bucket("QUOTA_TOKENS", "tokens", limits.tokens, clock)
        self.bytes = Bucket("QUOTA_BYTES", "bytes", limits.bytes, clock)
        self._most_streams = limits.streams
        self._streams = 0

    def open_stream(self) -> None:
        """Hold one stream until `close_stream`. Raises Overloaded (QUOTA_STREAMS)."""
        if self._most_streams and self._streams >= self._most_streams:
            said = f"{self._most_streams} streams are open, which is the quota"
            raise Overloaded("QUOTA_STREAMS", f"{said}; try again when one has ended")
        self._streams += 1

    def close_stream(self) -> None:
        self._streams -= 1

    def idle(self) -> bool:
        """Say whether this is what a new account looks like."""
        return not self._streams and all(
            bucket.full() for bucket in (self.requests, self.tokens, self.bytes)
        )


class Quotas:
    """The accounts of all principals that are not idle, the one used last at the end."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._accounts: OrderedDict[Caller, Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def of(self, caller: Caller) -> Account:
        self._forget()
        account = self._accounts.get(caller)
        if account is None:
            account = self._accounts[caller] = Account(self._limits, self._clock)
        self._accounts.move_to_end(caller)
        return account

    def _forget(self) -> None:
        for caller in list(islice(self._accounts, FORGOTTEN_AT_ONCE)):
            if self._accounts[caller].idle():
                del self._accounts[caller]
            else:
                self._accounts.move_to_end(caller)  # it shall not stand before those that are
