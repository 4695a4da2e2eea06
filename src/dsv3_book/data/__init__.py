"""Data: from text to the windows of tokens that a model trains on (report §4.1).

`corpus`: where documents come from, and which are held out. `tokenizer`: text to numbers and back. `augment`:
Fill-in-Middle, and line ends cut loose. `packing`: one flat array of tokens, and the order its windows are read in.
`dataset`: all of it together, cached, as `prepare(...)`.
"""

from dsv3_book.data.augment import Augmenter, NewlineSplitter, fim_parts, frame_fim
from dsv3_book.data.corpus import Corpus, Document, load_corpus
from dsv3_book.data.dataset import Dataset, EvalBatch, prepare
from dsv3_book.data.packing import CorruptShard, PackedTokens
from dsv3_book.data.tokenizer import Tokenizer

__all__ = [
    "Augmenter",
    "Corpus",
    "CorruptShard",
    "Dataset",
    "Document",
    "EvalBatch",
    "NewlineSplitter",
    "PackedTokens",
    "Tokenizer",
    "fim_parts",
    "frame_fim",
    "load_corpus",
    "prepare",
]
