"""Fill-in-Middle gives the document back, split line ends stand for the same bytes; both follow from the document."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_book.data import Augmenter, Document, NewlineSplitter, Tokenizer, fim_parts, frame_fim
from dsv3_book.data.corpus import stdlib_files

TEXTS = [path.read_text(encoding="utf-8") for path in stdlib_files() if path.stem in ("ast", "heapq", "bisect")]
TOKENIZER = Tokenizer.train(TEXTS, 600)
DOCUMENTS = [Document.of(str(n), text) for n, text in enumerate(" ".join(TEXTS).split("\n\n"))]


def unframed(ids: list[int]) -> str:
    """The document that ids stand for, with prefix, middle and suffix put back: the inverse of the framing."""
    assert ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id
    begin, hole, end = TOKENIZER.fim_ids
    if ids[1] != begin:
        return TOKENIZER.decode(ids[1:-1])
    assert [ids.count(mark) for mark in (begin, hole, end)] == [1, 1, 1]
    prefix, suffix, middle = (
        ids[2 : ids.index(hole)],
        ids[ids.index(hole) + 1 : ids.index(end)],
        ids[ids.index(end) + 1 : -1],
    )
    return "".join(TOKENIZER.decode(part) for part in (prefix, middle, suffix))


@given(texts=st.lists(st.text(min_size=1), max_size=5), rate=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99))
def test_the_document_can_be_put_together_again(texts, rate, seed):
    documents = [Document.of("", text) for text in texts]
    for newline_rate in (0.0, 1.0):
        rows = Augmenter(TOKENIZER, rate, newline_rate, seed).encode_batch(documents)
        assert [unframed(ids) for ids in rows] == texts
        assert all((ids[1] == TOKENIZER.fim_ids[0]) == (rate == 1.0) for ids in rows if rate != 0.5)


def test_the_order_is_prefix_suffix_middle():
    begin, hole, end = TOKENIZER.fim_ids
    assert frame_fim(TOKENIZER, [10, 11], [20], [30, 31]) == [begin, 10, 11, hole, 30, 31, end, 20]
    names = TOKENIZER.decode([begin, hole, end], specials=True)
    assert names == "<｜fim▁begin｜><｜fim▁hole｜><｜fim▁end｜>"


def test_the_rate_is_as_asked_and_cuts_fall_anywhere():
    documents = [Document.of("", f"document number {n}") for n in range(4000)]
    parts = [fim_parts(doc, 0.1, seed=0) for doc in documents]
    assert 0.085 < sum(p is not None for p in parts) / len(parts) < 0.115
    lengths = [tuple(len(part) for part in p) for p in (fim_parts(doc, 1.0, 0) for doc in documents)]
    assert all(0.3 < sum(column) / sum(map(sum, lengths)) < 0.37 for column in zip(*lengths))  # thirds, on average


def test_a_document_is_treated_alike_in_any_company():
    augmenter = Augmenter(TOKENIZER, 0.5, 0.5, seed=3)
    together = augmenter.encode_batch(DOCUMENTS)
    assert together == augmenter.encode_batch(DOCUMENTS[::-1])[::-1]
    assert together == list(itertools.chain(*(augmenter.encode_batch([doc]) for doc in DOCUMENTS)))
    assert together != Augmenter(TOKENIZER, 0.5, 0.5, seed=4).encode_batch(DOCUMENTS)


def test_marks_with_line_ends_are_split_at_the_rate_and_nothing_else_is():
    splitter = NewlineSplitter(TOKENIZER)
    combined = {TOKENIZER.decode([index]) for index in splitter.pieces}
    assert {"):\n", ",\n", ":\n"} <= combined
    assert not any(text.strip() == "" or "\n" not in text for text in combined)
    ids = TOKENIZER.encode(TEXTS[0])
    found = sum(index in splitter.pieces for index in ids)
    assert splitter(ids, 0.0, 1) == ids
    whole = splitter(ids, 1.0, 1)
    assert not set(whole) & set(splitter.pieces) and TOKENIZER.decode(whole) == TEXTS[0]
    part = splitter(ids, 0.3, 1)
    left = sum(index in splitter.pieces for index in part)
    assert 0.25 < 1 - left / found < 0.35 and TOKENIZER.decode(part) == TEXTS[0]
    assert part == splitter(ids, 0.3, 1) != splitter(ids, 0.3, 2)
    rows = Augmenter(TOKENIZER, newline_split_rate=1.0).encode_batch(DOCUMENTS)
    assert not {index for ids in rows for index in ids} & set(splitter.pieces)


def test_the_code_style_splits_too():
    tokenizer = Tokenizer.train(TEXTS, 600, style="code")
    split = NewlineSplitter(tokenizer)(ids := tokenizer.encode(TEXTS[0]), 1.0, 0)
    assert len(split) > len(ids) and tokenizer.decode(split) == TEXTS[0]


def test_bad_rates_and_missing_tokens_are_named():
    with pytest.raises(ValueError, match=r"fim_rate is 1\.1"):
        Augmenter(TOKENIZER, fim_rate=1.1)
    with pytest.raises(ValueError, match=r"newline_split_rate is -0\.1"):
        Augmenter(TOKENIZER, newline_split_rate=-0.1)
    bare = Tokenizer(TOKENIZER.spec.replace("fim▁", "other▁"))
    assert bare.fim_ids is None
    with pytest.raises(ValueError, match="no Fill-in-Middle tokens"):
        Augmenter(bare, fim_rate=0.1)
    with pytest.raises(ValueError, match="no Fill-in-Middle tokens"):
        frame_fim(bare, [], [], [])
    assert Augmenter(bare).encode_batch(DOCUMENTS[:1])
