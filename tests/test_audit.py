"""The audit counts what loops over the pairs count, and warns with the flag that helps."""

import numpy as np

from conet_jax.data import audit
from conet_jax.data.assemble import from_arrays
from conet_jax.data.types import Dataset


def data(seed: int = 0, **options) -> Dataset:
    rng = np.random.default_rng(seed)
    domains = []
    for size in (80, 40):  # a few popular items and a long tail
        weight = 1 / np.arange(1, size + 1)
        some = [rng.choice(size, 5, replace=False, p=weight / weight.sum()) for _ in range(60)]
        domains += [np.repeat(np.arange(60), 5), np.concatenate(some)]
    sizes = {"num_target_items": 80, "num_source_items": 40}
    return from_arrays(*domains, candidates=30, **sizes, **options)


def mean_over_orders(own: float, others: list[float]) -> tuple[float, float]:
    """NDCG@10 and HR@10 of one user, the mean over all places among equal scores."""
    first = 1 + sum(score > own for score in others)
    places = range(first, first + sum(score == own for score in others) + 1)
    gains = [1 / np.log2(place + 1) if place <= 10 else 0 for place in places]
    return float(np.mean(gains)), float(np.mean([place <= 10 for place in places]))


def test_cold_shares_and_scorers_are_those_of_a_loop():
    made = data()
    test = made.test._replace(mask=np.random.default_rng(1).random(made.test.mask.shape) < 0.7)
    trained = made.target.indices.tolist()
    count = [trained.count(item) for item in range(made.target.num_items)]
    found = audit.coldness(test, made.target)
    cold_candidates, ranks = [], {"popular": [], "cold_first": []}
    for item, row, mask in zip(test.items, test.candidates, test.mask, strict=True):
        listed = row[mask].tolist()
        cold_candidates += [count[other] == 0 for other in listed]
        for name in ranks:
            best = 10**6 if name == "cold_first" else 0
            scores = [count[other] or best for other in [item, *listed]]
            ranks[name].append(mean_over_orders(scores[0], scores[1:]))
    assert found["pairs"] == 60
    assert 0 < found["cold_positives"] == np.mean([count[item] == 0 for item in test.items])
    assert found["cold_candidates"] == np.mean(cold_candidates)
    for name, values in ranks.items():
        ndcg, hit_ratio = np.mean(values, axis=0)
        np.testing.assert_allclose(found[f"{name}_ndcg@10"], ndcg, rtol=1e-12)
        np.testing.assert_allclose(found[f"{name}_hit_ratio@10"], hit_ratio, rtol=1e-12)
    assert found["popular_ndcg@10"] != found["cold_first_ndcg@10"]


def test_every_held_out_part_is_in_the_audit_of_prepared_data():
    made = data()
    assert made.meta["audit"]["cold"]["valid"] == audit.coldness(made.valid, made.target)
    assert made.meta["audit"]["cold"]["test"] == audit.coldness(made.test, made.target)


def test_part_without_pairs_is_counted_and_not_printed():
    users = np.repeat(np.arange(3), 2)  # two items each: none for validation
    made = from_arrays(users, np.array([0, 1, 1, 2, 2, 3]), users, np.arange(6) % 4, candidates=1)
    assert made.meta["audit"]["cold"]["valid"] == {"pairs": 0}
    assert "validation" not in "\n".join(audit.lines(made.meta["audit"]))
    assert audit.lines({}) == audit.warnings({}) == []


def test_warning_names_the_flag_only_where_cold_items_tell_the_label():
    found = {"pairs": 9, "cold_positives": 0.24, "cold_candidates": 0.08}
    (line,) = audit.warnings({"cold": {"test": found}})
    assert "24.0%" in line and "8.0%" in line and "--min_item_users" in line
    for change in ({"cold_candidates": 0.2}, {"cold_positives": 0.04, "cold_candidates": 0.01}):
        assert audit.warnings({"cold": {"test": found | change}}) == []


def test_printed_lines_hold_the_stored_figures():
    made = data()
    text = "\n".join(audit.lines(made.meta["audit"]))
    for found in made.meta["audit"]["cold"].values():
        assert f"{100 * found['cold_positives']:.1f}%" in text
        for scorer in ("popular", "cold_first"):
            assert (
                f"{found[f'{scorer}_ndcg@10']:.4f}, {found[f'{scorer}_hit_ratio@10']:.4f}" in text
            )
