"""What a pair really did, in the form in which a pair is simulated: so one is drawn, counted and saved as the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dsv3_book.parallel.transport import Event as Message
from dsv3_book.pipeline.overlap import Event
from dsv3_book.pipeline.pair import Part, Streams

COMPUTED = {
    ("F", "attention"): "attention(F)",
    ("F", "mlp"): "mlp(F)",
    ("B", "mlp"): "mlp(B)",
    ("B", "mlp W"): "mlp(W)",
    ("B", "attention"): "attention(B)",
    ("B", "attention W"): "attention(W)",
}
TRAVELLED = {
    "dispatch F": "dispatch(F)",
    "combine F": "combine(F)",
    "dispatch B": "dispatch(B)",
    "combine B": "combine(B)",
}


def measured_pairs(events: Sequence[Event], messages: Sequence[Message], delay: float) -> list[Streams]:
    """The pairs of one rank's step, in order, in milliseconds from the start of each.

    events: of a `Watch`.  messages: of a `DelayedTransport` with this `delay` (seconds), so slow that the delay is all
    of a message's time: it is on its way from its start until `delay` later. Only rows are counted; the numbers that go
    with them travel beside them. Packing, unpacking, embedding and head count as neither.
    """
    streams = []
    for pair in _by_pair(events):
        begin, end = min(event.start for event in pair), max(event.end for event in pair)
        at_work = working(pair, messages)
        parts = [
            (COMPUTED[event.kind, event.part], event.start, event.end)
            for event in at_work
            if (event.kind, event.part) in COMPUTED
        ]
        parts += [
            (TRAVELLED[message.label.journey], message.issued, message.issued + delay)
            for message in messages
            if message.label.part == "rows" and begin <= message.issued < end
        ]
        streams.append(Streams(_numbered(parts, begin)))
    return streams


def working(events: Sequence[Event], messages: Sequence[Message]) -> list[Event]:
    """The same parts, begun when the last wait inside each was over: a recorded part begins with waiting for what it
    needs, and that is not work."""
    over = [message.wait_ended for message in messages if message.label.part != "counts"]
    return [
        event._replace(start=max([event.start, *(t for t in over if event.start < t < event.end)])) for event in events
    ]


def _by_pair(events: Iterable[Event]) -> list[list[Event]]:
    """Events of paired chunks, cut where both chunks of a pair have given way to others."""
    pairs: list[list[Event]] = []
    now: dict[str, tuple[int, int]] = {}
    for event in events:
        if not event.paired:
            now = {}
            continue
        chunk = event.stage, event.microbatch
        if not now or now.get(event.kind, chunk) != chunk:
            pairs.append([])
            now = {}
        now[event.kind] = chunk
        pairs[-1].append(event)
    return pairs


def _numbered(parts: list[tuple[str, float, float]], begin: float) -> list[Part]:
    layers: Counter[str] = Counter()
    out = []
    for name, start, end in sorted(parts, key=lambda part: part[1]):
        out.append(Part(name, layers[name], 1e3 * (start - begin), 1e3 * (end - begin)))
        layers[name] += 1
    return out
