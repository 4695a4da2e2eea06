"""Loops in the interpreter of Triton 3.6: it takes an array of one element for an integer, NumPy since 2.4 does not.

Triton 3.7 takes the element out itself. For 3.6 this module does, when it is imported and kernels are interpreted; on a
GPU nothing is touched.
"""

from typing import Any

import triton
from triton.runtime import interpreter


def repair() -> None:
    """Lets `for i in range(n)` run in an interpreted kernel whose n is an argument or was loaded."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if triton.knobs.runtime.interpret and triton.__version__.startswith("3.6"):
    repair()
