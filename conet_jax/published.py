"""Figures that others have published, as a data set's config has them beside ours."""

from typing import NamedTuple


class Protocol(NamedTuple):
    """Where figures are from, and what must be known to read them.

    Attributes:
      source: the publication.
      data: what they were measured on, and in what it differs from ours.
      ranking: the protocol.
      chosen: by what the epoch was chosen that is reported.
    """

    source: str
    data: str
    ranking: str
    chosen: str


class Figure(NamedTuple):
    """A row of a published table: the metrics at 10, over all test items.

    Attributes:
      method: as it is called there.
      hit_ratio: HR@10.
      ndcg: NDCG@10.
      mrr: MRR@10.
      protocol: of the table.
    """

    method: str
    hit_ratio: float
    ndcg: float
    mrr: float
    protocol: Protocol


# Of configs/phone_sport.py and configs/sport_phone.py.
CVGAE = Protocol(
    source="CVGAE, IEEE TKDE 2025",
    data="another draw of the same pairs of domains: as many users and pairs, other test items and "
    "negatives; comparable in expectation, not list by list",
    ranking="leave-one-out, 99 negatives, all test items",
    chosen="the best epoch on test",
)
