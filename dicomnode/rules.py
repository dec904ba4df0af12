"""The rules of the settings, understood: which of them a Series meets, and what they ask for."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from dicomnode import manifest, mining, store
from dicomnode.config import Rule, Settings
from dicomnode.core import region
from dicomnode.core.region import Region
from dicomnode.errors import ConfigError, ExpressionError
from dicomnode.mining import Expression
from dicomnode.model import DeliveryKind
from dicomnode.store import Ask


class Rules:
    """Rules whose expressions were read, so that they can be asked of a Series.

    Each curve is asked by the regions of the bundle that made it, as `dicomnode mine` does.
    """

    def __init__(self, rules: Sequence[Rule] = (), regions: Sequence[Region] = ()) -> None:
        """Read every expression.

        Parameters
        ----------
        rules, regions
            Those of the settings, and of the bundle that scores: what it does not know cannot
            be named.

        Raises
        ------
        ConfigError
            If an expression cannot be read, or a region is not known; the message has the key,
            and shows where.
        """
        self.rules = tuple(rules)
        self._regions = tuple(regions)
        self._bound: dict[str, tuple[Expression, ...]] = {}  # by the digest of a bundle
        for rule in rules:
            _check_region(rule, regions)
        self._read({})

    @classmethod
    def of(cls, settings: Settings) -> "Rules":
        """Return those of the settings; where there are none, nothing is read.

        Raises
        ------
        ConfigError
            See above.
        WeightsError
            If the bundle that names the regions is not there.
        """
        if not settings.rule:
            return cls()
        return cls(
            settings.rule, region.from_manifest(manifest.read_manifest(settings.score.model))
        )

    def named(self, name: str) -> Rule | None:
        """Return the rule of a name, None where there is none any more."""
        return next((rule for rule in self.rules if rule.name == name), None)

    def met(self, session: Session, series_id: int) -> list[Rule]:
        """Return the rules that a Series meets, as this transaction sees it; without a curve none.

        What `dicomnode mine` finds: by the evaluator that the SQL has to agree with, since all
        rules are then asked of one record.
        """
        if not self.rules:
            return []
        record = store.records(session, [series_id]).get(series_id)
        if record is None or record.bundle is None:
            return []
        expressions = self._of_bundle(session, record.bundle)
        pairs = zip(self.rules, expressions, strict=True)
        return [rule for rule, asked in pairs if mining.evaluate(asked, record)]

    def count(self, session: Session) -> list[tuple[Rule, int]]:
        """Return how many of the stored Series meet each rule."""
        expressions = self._read(store.mining_tables(session))
        pairs = zip(self.rules, expressions, strict=True)
        return [(rule, store.count_matches(session, asked)) for rule, asked in pairs]

    def _of_bundle(self, session: Session, digest: str) -> tuple[Expression, ...]:
        # A digest names one table for good.
        if digest not in self._bound:
            self._bound[digest] = self._read({digest: store.regions_of(session, digest)})
        return self._bound[digest]

    def _read(self, tables: dict[str, tuple[Region, ...]]) -> tuple[Expression, ...]:
        found = []
        for rule in self.rules:
            try:
                found.append(mining.parse(rule.when, self._regions, tables))
            except ExpressionError as exc:
                raise ConfigError(f"rule.{rule.name}.when: {exc}") from exc
        return tuple(found)


def asks(series_uid: str, met: Sequence[Rule]) -> list[Ask]:
    """Return what is asked for when a Series meets these rules."""
    found = []
    for rule in met:
        if rule.send_to is not None:
            kind, destination = DeliveryKind.FORWARD, rule.send_to
        else:
            assert rule.webhook is not None  # a rule has either
            kind, destination = DeliveryKind.WEBHOOK, rule.webhook
        found.append(Ask(kind, destination, series_uid, rule=rule.name))
    return found


def region_of(rule: Rule, regions: Sequence[Region]) -> Region | None:
    """Return the region that a rule names, of a bundle's; None where that does not know it."""
    return region.lookup(regions, (rule.region or "").replace("_", " "))


def _check_region(rule: Rule, regions: Sequence[Region]) -> None:
    if rule.region is None:
        return
    key = f"rule.{rule.name}.region"
    found = region_of(rule, regions)
    if found is None:
        known = ", ".join(r.name for r in regions) or "none"
        raise ConfigError(f"{key}: no region '{rule.region}': the weight bundle has {known}")
    if found.low_mm is None and found.high_mm is None:
        raise ConfigError(f"{key}: where {found.name} lies is not known")
