"""Whole models in FP8: which modules, close to the unquantised model, and in every setting the model knows."""

import subprocess
import sys
import textwrap


def in_a_process_of_its_own(code):
    """Runs code without this session's type checks; returns what it printed."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compiled_without_a_break():
    in_a_process_of_its_own("""
        import torch
        from dsv3_book.fp8.linear import Fp8Linear
        from dsv3_book.model import ops

        x, dy = torch.randn(9, 70), torch.randn(9, 50)
        for after_attention in (False, True):
            layer = ops.Linear(70, 50)
            torch.nn.init.normal_(layer.weight)
            layer.product = Fp8Linear(after_attention)
            answers = []
            for fn in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
                leaf = x.clone().requires_grad_()
                layer.weight.grad = None
                y = fn(leaf)
                y.backward(dy)
                answers.append((y.detach(), leaf.grad, layer.weight.grad))
            assert all(torch.equal(a, b) for a, b in zip(*answers))
    """)


def test_without_triton():
    """A step through every FP8 layer on a machine that has no Triton."""
    printed = in_a_process_of_its_own("""
        import sys

        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name="triton")

        sys.meta_path.insert(0, NoTriton())
        import torch
        from dsv3_book.config import ModelConfig
        from dsv3_book.fp8.layers import use_fp8
        from dsv3_book.model import Transformer

        model = Transformer(ModelConfig.preset("tiny"))
        use_fp8(model)
        losses = model.losses(torch.arange(2 * 18).view(2, 18) % model.cfg.vocab_size)
        (losses.main + losses.mtp).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert "triton" not in sys.modules
        try:
            import dsv3_book.fp8.kernels
        except ImportError as error:
            print(error)
    """)
    assert "riton" in printed
