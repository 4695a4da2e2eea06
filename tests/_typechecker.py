"""The checker that `conftest.py` puts around the package's functions: beartype, with ints allowed for floats."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
