"""Bytes per link from the routing alone, against a count by hand, token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.model.router import select
from dsv3_book.parallel.traffic import fan_out, traffic_of


@st.composite
def routings(draw):
    nodes, per_node, each = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    E = nodes * per_node * each
    N, K = draw(st.integers(0, 8)), draw(st.integers(1, min(5, E)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    experts = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(N)]) if N else torch.zeros(0, K).long()
    return experts, torch.randint(nodes * per_node, (N,), generator=g), nodes, per_node, E


def by_hand(experts, source, nodes, per_node, E, two_hop) -> dict[tuple[int, int], int]:
    """Copies from rank to rank, written as one would tell it."""
    each = E // (nodes * per_node)
    sent: dict[tuple[int, int], int] = {}
    for chosen, here in zip(experts.tolist(), source.tolist(), strict=True):
        targets = {e // each for e in chosen}
        if two_hop:
            journeys = set()
            for node in {t // per_node for t in targets}:
                relay = node * per_node + here % per_node
                journeys |= {("hop 1", here, relay)} | {("hop 2", relay, t) for t in targets if t // per_node == node}
        else:
            journeys = {("", here, t) for t in targets}
        for _, a, b in journeys:
            sent[a, b] = sent.get((a, b), 0) + 1
    return sent


@given(routings(), st.booleans())
def test_copies_are_what_a_count_by_hand_gives(case, two_hop):
    experts, source, nodes, per_node, E = case
    found = traffic_of(experts, E, nodes * per_node, per_node, width=10, two_hop=two_hop, source=source)
    expected = {"self": 0, "nvlink": 0, "ib": 0}
    for (a, b), n in by_hand(experts, source, nodes, per_node, E, two_hop).items():
        expected["self" if a == b else "nvlink" if a // per_node == b // per_node else "ib"] += n
    for way in ("scatter", "gather"):
        assert {name: found[way][name].copies for name in expected} == expected
        assert {name: found[way][name].payload for name in expected} == {n: 20 * c for n, c in expected.items()}


@given(routings(), st.booleans(), st.booleans())
def test_the_ranks_add_up(case, two_hop, backward):
    experts, source, nodes, per_node, E = case
    kinds = {"width": 10, "two_hop": two_hop, "fp8": True, "backward": backward, "source": source}
    every = [traffic_of(experts, E, nodes * per_node, per_node, rank=r, **kinds) for r in range(nodes * per_node)]
    whole = traffic_of(experts, E, nodes * per_node, per_node, **kinds)
    for way in whole:
        total = every[0][way]
        for one in every[1:]:
            total = total + one[way]
        assert total == whole[way]
        assert whole["scatter"]["ib"].payload == whole["scatter"]["ib"].copies * (10 + 4)


def test_node_limited_routing_caps_the_crossings_of_ib():
    """C17: with V3's router no token reaches more than 4 of 8 nodes, and two hops cross IB once for each (but its own);
    without the limit it would be up to 8, and direct sending crosses once per rank."""
    g = torch.Generator().manual_seed(0)
    N, E, R, L = 4096, 256, 64, 8
    scores = torch.rand(N, E, generator=g)
    limited, free = select(scores, torch.zeros(E), 8, 4, 8), select(scores, torch.zeros(E), 1, 1, 8)
    assert int(fan_out(limited, E, 8).max()) == 4
    assert int(fan_out(free, E, 8).max()) > 4
    own = torch.arange(N) * R // N // L
    for experts in (limited, free):
        crossings = fan_out(experts, E, 8) - (experts // (E // 8) == own[:, None]).any(1).long()
        two = traffic_of(experts, E, R, L, width=7168, two_hop=True, fp8=True)
        assert two["scatter"]["ib"].copies == int(crossings.sum())
        direct = traffic_of(experts, E, R, L, width=7168, two_hop=False, fp8=True)
        assert direct["scatter"]["ib"].copies > two["scatter"]["ib"].copies
        assert direct["scatter"]["nvlink"].copies < two["scatter"]["nvlink"].copies


def test_experts_must_divide():
    with pytest.raises(ValueError, match="6 experts don't divide among 4 ranks"):
        traffic_of(torch.zeros(1, 1).long(), 6, 4, 2, width=1, two_hop=True)
