"""Tells a webhook what was taken of the outbox."""

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Engine

from dicomnode import store
from dicomnode.config import Settings
from dicomnode.errors import TransientError
from dicomnode.model import DeliveryState
from dicomnode.outgoing import matched, notice, webhook
from dicomnode.outgoing.work import Work, shown

logger = logging.getLogger(__name__)

Tell = Callable[[Engine, Settings, store.Delivery], dict[str, Any]]


class ToWebhook:
    """Tells a webhook, one notice a request."""

    def carry(self, work: Work, taken: Sequence[store.Delivery]) -> None:
        """Tell what deliveries stand for."""
        secret = webhook.read_secret(work.settings.deliver.webhook_secret_file)
        for delivery in taken:
            told = work.make(delivery, teller(delivery))
            if told is None:
                continue
            try:
                self._tell(work, delivery, told, secret)
            except TransientError:
                raise
            except Exception as exc:
                work.failed(delivery, exc)

    def _tell(
        self,
        work: Work,
        delivery: store.Delivery,
        told: dict[str, Any],
        secret: webhook.Secret | None,
    ) -> None:
        # The same for each repeat; another once it was asked for anew.
        identity = f"{delivery.id}.{delivery.version}"
        try:
            webhook.post(work.destination, {"id": identity, **told}, identity, secret, work.clock())
        except webhook.WebhookError as exc:
            if exc.status == webhook.GONE:
                work.settle(delivery, DeliveryState.FAILED, reason=str(exc))
                return
            work.retry(delivery, str(exc), exc.after_s)
            if exc.status is None or exc.status >= 500 or exc.status == 429:
                raise  # it is the server, not this notice
            return
        work.settle(delivery, DeliveryState.DONE)
        logger.info(
            "delivered",
            extra={
                "delivery": delivery.id,
                "kind": str(delivery.what.kind),
                "destination": shown(work.destination),
            },
        )

    def after(self, work: Work, now: datetime) -> int:
        """Nothing else is to be done."""
        return 0


def teller(delivery: store.Delivery) -> Tell:
    """Return what makes the notice of a delivery."""
    return matched.make if delivery.what.rule else notice.make
