"""What was taken of the outbox for one destination: made when it is its turn, and settled."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.errors import DicomError, ObjectError, TransientError
from dicomnode.model import DeliveryState
from dicomnode.outgoing import Nothing, NotYet, webhook
from dicomnode.outgoing.asking import destinations

logger = logging.getLogger(__name__)

LEASE = timedelta(minutes=10)  # renewed while what was taken is being sent
FIRST = timedelta(seconds=10)  # to the second attempt; doubled for each
LONGEST = timedelta(hours=1)
# Whatever `give_up_hours` says.
LEAST_ATTEMPTS = 5
# A Study that is still arriving is waited for so long.
GROWING = timedelta(hours=1)
NOT_CONFIGURED = "this destination is configured no more"
# How long who gives that up waits for another exchange, started with newer settings, to take it.
CONFIGURED = timedelta(hours=1)

Clock = Callable[[], datetime]


def backoff(attempts: int, luck: float) -> timedelta:
    """Return how long to wait after so many attempts; `luck`, 0 to 1, spreads those of many.

    10 s, doubled for each, an hour at most; a quarter more or less.
    """
    return min(FIRST * (1 << min(attempts, 20)), LONGEST) * (0.75 + 0.5 * luck)


def shown(destination: str) -> str:
    """Return a destination as it may be logged: of a URL its host, for the rest may hold a key."""
    return webhook.host_of(destination) if "://" in destination else destination


def first_failure(delivery: store.Delivery, now: datetime) -> datetime:
    """Return since when a delivery fails, if it fails now.

    Not since it was asked for: this node may have been down since, and the peer not once.
    """
    return min(delivery.failed_at or now, now)  # the clock may have been set back


class Work:
    """What was taken for one destination, and how to settle it."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        destination: str,
        clock: Clock,
        luck: Callable[[], float],
    ) -> None:
        self.settings, self.engine, self.destination = settings, engine, destination
        self.clock, self.luck = clock, luck
        self.give_up = timedelta(hours=settings.deliver.give_up_hours)
        self._known = destinations(settings)
        self.delivered = False  # something of what was taken
        self._open: dict[int, store.Delivery] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def holding(self, taken: Sequence[store.Delivery]) -> Iterator[None]:
        """Renew the lease of what was taken until it is settled."""
        self._open = {d.id: d for d in taken}
        self.delivered = False
        over = threading.Event()

        def renew() -> None:
            while not over.wait(LEASE.total_seconds() / 3):
                try:
                    self._hold()
                except TransientError as exc:  # another exchange may send the same as well
                    logger.warning("lease not renewed", extra={"reason": str(exc)})

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._open = {}

    def _hold(self) -> None:
        with self._lock, store.writing(self.engine) as session:  # none is settled meanwhile
            if self._open:
                until = self.clock() + LEASE
                store.hold_deliveries(session, list(self._open.values()), until)

    def make(self, delivery: store.Delivery, make: Callable[..., Any]) -> Any:
        """Return what a delivery stands for at this moment, None where nothing is to be sent.

        To be called right before it is sent, and not for all that was taken: while others are on
        their way a note may reject an image, or two patients be taken apart.
        """
        try:
            if not self._is_wanted(delivery):
                return None
            return make(self.engine, self.settings, delivery)
        except Nothing as exc:
            self.settle(delivery, DeliveryState.DROPPED, reason=str(exc) or None)
        except NotYet as exc:
            self.postpone(replace(delivery, reason=str(exc)), FIRST)
        except ObjectError as exc:
            self.settle(delivery, DeliveryState.DROPPED, reason=str(exc))
        except DicomError as exc:  # of what is held, which may be sent again
            self.retry(delivery, str(exc))
        except TransientError:
            raise
        except Exception as exc:  # one that cannot be made must not stop those behind it
            logger.exception("delivery not made", extra={"delivery": delivery.id})
            self.retry(delivery, f"not made: {type(exc).__name__}")
        return None

    def _is_wanted(self, delivery: store.Delivery) -> bool:
        """Whether a delivery is to be sent now; settled where not.

        Not where it was dropped or asked for anew since it was taken, is configured no more, or of
        a Study that still arrives.
        """
        what = delivery.what
        with store.reading(self.engine) as session:
            waits = store.still_waits(session, delivery)
            growing = what.other and store.is_growing(session, (what.subject, what.other))
        if not waits:
            with self._lock:
                self._open.pop(delivery.id, None)
            return False
        if (what.kind, what.destination, what.rule) not in self._known:
            if self.clock() - delivery.asked_at >= CONFIGURED:
                self.settle(delivery, DeliveryState.FAILED, reason=NOT_CONFIGURED)
            else:
                self.postpone(replace(delivery, reason=NOT_CONFIGURED), CONFIGURED / 10)
            return False
        # Either way: where the clock was set back, it was asked for in the future.
        if growing and abs(self.clock() - delivery.asked_at) < GROWING:
            wait = max(timedelta(seconds=self.settings.deliver.settle_seconds), FIRST)
            self.postpone(delivery, wait)
            return False
        return True

    def settle(self, delivery: store.Delivery, state: DeliveryState, **values: Any) -> None:
        """Note how an attempt went."""
        with self._lock:
            with store.writing(self.engine) as session:
                noted = store.settle_delivery(session, delivery, state, self.clock(), **values)
            self._open.pop(delivery.id, None)
        self.delivered |= state is DeliveryState.DONE
        if noted and state is DeliveryState.FAILED:
            logger.error(
                "delivery given up",
                extra={
                    "delivery": delivery.id,
                    "kind": str(delivery.what.kind),
                    "destination": shown(self.destination),
                    "reason": values.get("reason"),
                },
            )

    def retry(self, delivery: store.Delivery, reason: str, after_s: float = 0.0) -> None:
        """Note that an attempt failed; the next one is later and later, until it is given up."""
        now = self.clock()
        since = first_failure(delivery, now)
        if delivery.attempts + 1 >= LEAST_ATTEMPTS and now - since >= self.give_up:
            self.settle(delivery, DeliveryState.FAILED, failed_at=since, reason=reason)
            return
        wait = max(backoff(delivery.attempts, self.luck()), timedelta(seconds=after_s))
        self._wait(delivery, now, wait, reason)

    def failed(self, delivery: store.Delivery, exc: Exception) -> None:
        """Note that an attempt failed for a reason that nobody foresaw; the others go on."""
        logger.error("delivery not sent", extra={"delivery": delivery.id}, exc_info=exc)
        self.retry(delivery, f"not sent: {type(exc).__name__}")

    def fail_all(self, exc: Exception) -> None:
        """Note the same of all that is not settled yet."""
        for delivery in list(self._open.values()):
            self.failed(delivery, exc)

    def postpone(self, delivery: store.Delivery, wait: timedelta) -> None:
        """Note that this was no attempt."""
        self.settle(
            delivery,
            DeliveryState.WAITING,
            due_at=self.clock() + wait,
            attempts=delivery.attempts,
            reason=delivery.reason,
        )

    def leave(self, wait: timedelta, reason: str | None = None) -> int:
        """Let go of all that is not settled yet, for so long; with a reason it was an attempt.

        Returns
        -------
        int
            How many that were.
        """
        left = list(self._open.values())
        for delivery in left:
            if reason is None:
                self.postpone(delivery, wait)
            else:
                self._wait(delivery, self.clock(), wait, reason)
        return len(left)

    def _wait(self, delivery: store.Delivery, now: datetime, wait: timedelta, reason: str) -> None:
        since = first_failure(delivery, now)
        due_at = now + wait
        self.settle(delivery, DeliveryState.WAITING, due_at=due_at, failed_at=since, reason=reason)
