"""pair: the released profile's order and what it hides, dependencies and streams, cases by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_book.pipeline import pair as p
from dsv3_book.pipeline.pair import BACKWARD, FORWARD, PROFILE, PROFILE_LAYERS, RELEASED, alone, is_communication, pair

ONES = dict.fromkeys(RELEASED, 1.0)
DENSE = {name: time for name, time in ONES.items() if not is_communication(name)}


def starts(streams):
    return {(part.name, part.layer): part.start for part in streams.parts}


def test_one_layer_by_hand():
    times = ONES | {"dispatch(F)": 2.0}
    assert starts(pair([times], [times])) == {
        ("attention(F)", 0): 0, ("mlp(B)", 0): 1, ("mlp(W)", 0): 2, ("mlp(F)", 0): 3,
        ("attention(B)", 0): 4, ("attention(W)", 0): 5,
        ("combine(B)", 0): 0, ("dispatch(F)", 0): 1, ("dispatch(B)", 0): 3, ("combine(F)", 0): 4,
    }  # fmt: skip


def test_the_profiles_mean_layer_gives_its_span_within_two_percent():
    streams = pair([PROFILE] * 4, [PROFILE] * 4)
    assert streams.span == pytest.approx(130.93)
    assert abs(streams.span / p.PROFILE_SPAN - 1) < 0.02
    assert streams.communication == pytest.approx(p.PROFILE_COMMUNICATION, abs=0.05)
    assert streams.hidden_share == pytest.approx(0.988, abs=0.001)
    # all that is exposed is the first transfer, which no earlier layer's attention(W) hides
    assert streams.communication - streams.hidden == pytest.approx(PROFILE["combine(B)"] - PROFILE["attention(F)"])


def test_the_profiles_own_layers_come_within_a_percent():
    streams = pair(PROFILE_LAYERS, PROFILE_LAYERS)
    assert abs(streams.span / p.PROFILE_SPAN - 1) < 0.01
    assert 0.96 < streams.hidden_share < 0.99
    mean = {name: sum(layer[name] for layer in PROFILE_LAYERS) / 4 for name in RELEASED}
    for name in set(RELEASED) - {"mlp(W)"}:  # kernels' busy time against wall time: under half a millisecond of gaps
        assert 0 <= mean[name] - PROFILE[name] < 0.3, name
    assert mean["mlp(W)"] < PROFILE["mlp(W)"]  # its kernels run side by side


def test_each_transfer_hides_where_the_profiles_does():
    # Wall times in the released profile, our reading, ms a layer
    seen = {
        "combine(B)": {"attention(W)": 1.79, "attention(F)": 3.80},
        "dispatch(F)": {"mlp(B)": 5.35, "mlp(W)": 1.38},
        "dispatch(B)": {"mlp(W)": 3.60, "mlp(F)": 3.52},
        "combine(F)": {"attention(B)": 8.70},
    }
    under = pair(PROFILE_LAYERS, PROFILE_LAYERS).under
    assert {name: set(row) for name, row in under.items()} == {name: set(row) for name, row in seen.items()}
    for name, row in seen.items():
        for part, time in row.items():
            assert under[name][part] / 4 == pytest.approx(time, abs=0.15), (name, part)


def test_the_released_order_beats_a_chunk_after_the_other():
    apart = alone("F", [PROFILE] * 4).span + alone("B", [PROFILE] * 4).span
    assert apart == pytest.approx(sum(PROFILE.values()) * 4)
    assert apart / pair([PROFILE] * 4, [PROFILE] * 4).span == pytest.approx(1.864, abs=0.001)


def test_another_order_hides_less():
    naive = (*FORWARD, *(name for name in RELEASED if name not in FORWARD))
    streams = pair([PROFILE] * 4, [PROFILE] * 4, naive)
    assert streams.span > 1.2 * p.PROFILE_SPAN
    assert streams.hidden_share < 0.8


def test_an_impossible_order_says_what_waits_for_what():
    bad = ("combine(F)", *(name for name in RELEASED if name != "combine(F)"))
    with pytest.raises(ValueError, match="can't run") as said:
        pair([ONES] * 2, [ONES] * 2, ("mlp(F)", *(name for name in RELEASED if name != "mlp(F)")))
    assert "mlp(F) of layer 0 waits for dispatch(F) of layer 0" in str(said.value)
    with pytest.raises(ValueError, match="combine"):
        pair([ONES], [ONES], ("combine(F)", "dispatch(F)", "dispatch(F)"))
    with pytest.raises(ValueError, match=r"combine\(F\) of layer 0 waits for"):
        pair([ONES], [ONES], bad)


@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_weight_gradients_follow_their_input_gradients(part):
    first = [name for name in RELEASED if name != f"{part}(W)"]
    first.insert(first.index(f"{part}(B)"), f"{part}(W)")
    with pytest.raises(ValueError, match=rf"{part}\(W\) of layer 0 waits for {part}\(B\) of layer 0"):
        pair([ONES], [ONES], first)


def test_chunks_alone():
    layers = [PROFILE] * 2
    assert alone("F", layers).span == pytest.approx(2 * sum(PROFILE[name] for name in FORWARD))
    assert alone("I", layers).span == pytest.approx(2 * sum(PROFILE[name] for name in BACKWARD))
    assert alone("W", layers).span == pytest.approx(2 * (PROFILE["mlp(W)"] + PROFILE["attention(W)"]))
    assert alone("B", layers).span == pytest.approx(alone("I", layers).span + alone("W", layers).span)
    assert alone("F", layers, both=True).span == alone("F", layers).span  # a chain gains nothing from a second stream
    assert alone("B", layers, both=True).span < alone("B", layers).span
    assert alone("F", layers).hidden == 0
    with pytest.raises(ValueError, match="'FB'"):
        alone("FB", layers)


def test_dense_layers_and_chunks_of_other_lengths():
    streams = pair([DENSE, ONES, ONES], [ONES])
    assert {part.layer for part in streams.parts if part.name == "attention(F)"} == {0, 1, 2}
    assert ("dispatch(F)", 0) not in starts(streams) and ("dispatch(F)", 1) in starts(streams)
    assert pair([DENSE] * 3, [DENSE] * 2).communication == 0
    assert pair([DENSE] * 3, [DENSE] * 2).hidden_share == 1
    assert pair([], []).span == 0
    # nothing is lost when a dense layer's neighbour waits for the part before the gap
    alone_first = starts(alone("F", [DENSE, ONES]))
    assert alone_first["attention(F)", 1] == 2 and alone_first["mlp(F)", 1] == 4


layers = st.lists(st.fixed_dictionaries({name: st.floats(0, 10) for name in RELEASED}), max_size=4)


@given(layers, layers)
@settings(max_examples=60)
def test_invariants(forward, backward):
    streams = pair(forward, backward)
    assert len(streams.parts) == 4 * len(forward) + 6 * len(backward)
    assert streams.span >= max(streams.compute, streams.communication) - 1e-9
    assert streams.span <= alone("F", forward).span + alone("B", backward).span + 1e-9
    assert -1e-9 <= streams.hidden <= streams.communication + 1e-9
    ends = {(part.name, part.layer): part for part in streams.parts}
    for chain in (FORWARD, BACKWARD, ("mlp(B)", "mlp(W)"), ("attention(B)", "attention(W)")):
        for layer in range(len(forward if chain is FORWARD else backward)):
            for before, after in zip(chain, chain[1:]):  # noqa: RUF007
                assert ends[before, layer].end <= ends[after, layer].start
    for communicates in (False, True):
        mine = [part for part in streams.parts if part.communicates == communicates and part.end > part.start]
        assert all(a.end <= b.start for a, b in zip(mine, mine[1:]))  # noqa: RUF007
