"""Tokenizer: lossless for any text, deterministic, and blind to special tokens written in a text."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsv3_book.data import Tokenizer
from dsv3_book.data.corpus import stdlib_files
from dsv3_book.data.tokenizer import BOS, EOS, FIM_HOLE, SPECIALS

TEXTS = [path.read_text(encoding="utf-8") for path in stdlib_files() if path.stem in ("ast", "heapq", "bisect")]


@pytest.fixture(scope="module", params=["v3", "code"])
def tokenizer(request):
    return Tokenizer.train(TEXTS, 600, style=request.param)


@given(text=st.text())
@example("")
@example("\x00\r\n\t 1234567 日本語カタカナ  \u200d👩‍🚀 e\u0301\n")
@example(f"{BOS}x{EOS}{FIM_HOLE}<｜reserved▁0｜>")
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert all(tokenizer.byte_lengths[index] > 0 for index in ids)


@given(texts=st.lists(st.text(), max_size=4))
def test_a_batch_is_each_text(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("name", [*SPECIALS, "<｜reserved▁0｜>"])
def test_a_special_tokens_name_in_a_text_is_plain_text(name):
    tokenizer = Tokenizer.train(["a b c"], 400)  # most of it is reserved tokens
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.fim_ids}
    text = f"print('{name}')  {name}"
    ids = tokenizer.encode(text)
    assert not special & set(ids) and tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text]) == [ids]


def test_a_special_token_that_a_file_calls_ordinary_is_plain_text_too(tmp_path):
    # The released file lists the Fill-in-Middle tokens as added tokens with "special": false.
    fields = json.loads(Tokenizer.train(TEXTS[:1], 300).spec)
    for token in fields["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = Tokenizer.load(tmp_path)
    assert not {*tokenizer.fim_ids, tokenizer.eos_id} & set(tokenizer.encode("".join(SPECIALS)))
    assert tokenizer.decode(tokenizer.encode("".join(SPECIALS))) == "".join(SPECIALS)


def test_special_tokens_have_ids_of_their_own(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)  # as in the released file
    ids = tokenizer.encode("hi", bos=True, eos=True)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and ids[1:-1] == tokenizer.encode("hi")
    assert tokenizer.decode(ids) == "hi" and tokenizer.decode(ids, specials=True) == f"{BOS}hi{EOS}"
    assert len({*tokenizer.fim_ids, 0, 1, 2}) == 6


def test_training_is_deterministic_and_the_size_is_as_asked():
    one, two = Tokenizer.train(TEXTS, 700), Tokenizer.train(TEXTS, 700)
    assert one.spec == two.spec and one.vocab_size == 700
    assert Tokenizer.train(["tiny"], 500).vocab_size == 500
    assert sorted(json.loads(one.spec)["model"]["vocab"].values()) == list(range(700))


def test_pieces_are_cut_as_the_released_tokenizer_cuts_them():
    v3 = Tokenizer.train(["x"], 262)
    for text, expected in {
        "12345678": ["123", "456", "78"],
        "x1234": ["x", "123", "4"],
        "日本語カタカナabc": ["日本語カタカナ", "abc"],
        "def f(self, x):\n    return x": ["def", " f", "(self", ",", " x", "):\n", "   ", " return", " x"],
        "a.join(b_c)": ["a", ".join", "(b", "_c", ")"],
        "don't  stop!\r\n\r\n": ["don", "'t", " ", " stop", "!\r\n\r\n"],
        "a\n\n\n  b": ["a", "\n\n\n", " ", " b"],
        "end  ": ["end", "  "],
    }.items():
        assert v3.pieces(text) == expected
    code = Tokenizer.train(["x"], 262, style="code")
    assert code.pieces("f():\n        x\n    y\nz") == ["f", "():\n       ", " x", "\n   ", " y", "\n", "z"]


def test_the_code_style_needs_fewer_tokens_for_code():
    v3, code = (Tokenizer.train(TEXTS, 1000, style=style) for style in ("v3", "code"))
    assert sum(map(len, code.encode_batch(TEXTS))) < 0.97 * sum(map(len, v3.encode_batch(TEXTS)))


def test_save_and_load(tmp_path, tokenizer):
    path = tokenizer.save(tmp_path)
    assert path == tmp_path / "tokenizer.json" and list(tmp_path.iterdir()) == [path]
    for place in (path, tmp_path, str(path)):
        again = Tokenizer.load(place)
        assert again.spec == tokenizer.spec and again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_other_programs_can_read_our_file(tmp_path, tokenizer):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path)))
    ids = theirs.encode(TEXTS[0][:2000]).ids
    assert ids == tokenizer.encode(TEXTS[0][:2000]) and theirs.decode(ids) == TEXTS[0][:2000]


def test_bad_files_are_named(tmp_path):
    good = Tokenizer.train(["x"], 262).spec
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json"):
        Tokenizer.load(tmp_path)
    fields = json.loads(good)
    word_level = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    for content, message in {
        good[:-100]: "not the content of a tokenizer.json",
        "[1]": "not the content of a tokenizer.json",
        '{"model": {}}': "not the content of a tokenizer.json",
        json.dumps(
            fields | {"added_tokens": fields["added_tokens"][:1]}
        ): "no special token <｜end▁of▁sentence｜>|byte",
        json.dumps(fields | {"model": word_level}): "no byte-level BPE",
    }.items():
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=f"tokenizer.json: .*({message})"):
            Tokenizer.load(tmp_path)


def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="vocab_size is 261: byte-level BPE needs 262"):
        Tokenizer.train(["x"], 261)
    with pytest.raises(ValueError, match="unknown tokenizer style 'gpt'"):
        Tokenizer.train(["x"], 300, style="gpt")
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary"):
            tokenizer.decode([wrong])


def test_half_a_character_is_shown_not_raised(tokenizer):
    ids = tokenizer.encode("🚀")
    assert len(ids) > 1 and tokenizer.decode(ids[:1]) == "\ufffd"
