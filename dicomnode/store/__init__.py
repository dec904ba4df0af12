"""Every SQL query of the node: functions named for what it needs, a Session first.

Other modules see frozen values, never ORM rows. All writes of one call belong to the
caller's transaction.
"""

from dicomnode.store.answers import (
    count_offsets,
    count_quarantined,
    count_series,
    covariance_of,
    curve_of,
    curves_of,
    heights_of,
    is_waiting,
    list_quarantined,
    list_series,
    manifest_of,
    open_slices,
    regions_of,
)
from dicomnode.store.intake import (
    claim_series,
    end_association,
    end_lost_associations,
    finish_series,
    has_lost_associations,
    next_completion,
    open_series,
    quiet_at,
    record_model,
    record_quarantined,
    record_slices,
)
from dicomnode.store.pairs import offsets_of, pending_offsets, store_offsets, trust
from dicomnode.store.previews import prune_previews
from dicomnode.store.rescoring import count_stale, exchange_scores, kept_inputs, stale_series
from dicomnode.store.session import available, opened, reading, sqlite_file, writing
from dicomnode.store.values import (
    Claimed,
    KeptInputs,
    OpenSeries,
    PendingOffset,
    SeriesRow,
    SliceResult,
    StaleSeries,
    StoredOffset,
)

__all__ = [
    "Claimed",
    "KeptInputs",
    "OpenSeries",
    "PendingOffset",
    "SeriesRow",
    "SliceResult",
    "StaleSeries",
    "StoredOffset",
    "available",
    "claim_series",
    "count_offsets",
    "count_quarantined",
    "count_series",
    "count_stale",
    "covariance_of",
    "curve_of",
    "curves_of",
    "end_association",
    "end_lost_associations",
    "exchange_scores",
    "finish_series",
    "has_lost_associations",
    "heights_of",
    "is_waiting",
    "kept_inputs",
    "list_quarantined",
    "list_series",
    "manifest_of",
    "next_completion",
    "offsets_of",
    "open_series",
    "open_slices",
    "opened",
    "pending_offsets",
    "prune_previews",
    "quiet_at",
    "reading",
    "record_model",
    "record_quarantined",
    "record_slices",
    "regions_of",
    "sqlite_file",
    "stale_series",
    "store_offsets",
    "trust",
    "writing",
]
