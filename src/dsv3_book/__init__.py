"""DeepSeek-V3's training system, rebuilt piece by piece.

Importing the package is light on purpose: it brings no torch and no matplotlib. Take what you need from the module that
has it: ``dsv3_book.config``, ``dsv3_book.costs``, ``dsv3_book.model``, ``dsv3_book.data``, ``dsv3_book.train`` …
"""

__version__ = "0.1.0"
