"""The pool itself: errors are told, one failure does not spoil the next job, and no process is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist

from dsv3_book.parallel.workers import Pool, WorkerError

pytestmark = pytest.mark.distributed


def add_up(value: float) -> float:
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    return total.item()


def config(value: float) -> float:
    return dist.get_world_size() * value


def test_a_function_may_use_a_name_that_a_torch_module_has(pool) -> None:
    """`dist` and `config` look to cloudpickle like torch.distributed.config, which it can't copy."""

    def f() -> float:
        return dist.get_rank() + config(2)

    assert pool(2).run(f) == [4, 5]


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("a mistake on purpose")
    dist.barrier()


def die() -> None:
    if dist.get_rank() == 0:
        os.write(2, b"the last words\n")
        os._exit(3)
    dist.barrier()


def sleep_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_every_rank_answers(pool) -> None:
    assert pool(2).run(add_up, 10.0) == [30.0, 30.0]


def test_functions_and_results_of_here_travel_by_value(pool, capsys) -> None:
    factor = 3

    class Answer:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    def answer(x: torch.Tensor) -> Answer:
        print("at work")
        return Answer(x * factor + dist.get_rank())

    answers = pool(2).run(answer, torch.ones(2, requires_grad=True))
    assert [a.x.tolist() for a in answers] == [[3, 3], [4, 4]]
    assert all(isinstance(a, Answer) and a.x.requires_grad for a in answers)
    assert capsys.readouterr().out == "rank 0: at work\nrank 1: at work\n"


def test_a_failure_is_told_and_the_pool_goes_on(pool) -> None:
    with pytest.raises(WorkerError, match=r"rank 1 failed:(.|\n)*a mistake on purpose"):
        pool(2).run(fail_on_one)
    with pytest.raises(
        WorkerError, match=r"rank 0 died \(exit code 3\)\n(.|\n)*the last words(.|\n)*rank 1 then failed"
    ):
        pool(2).run(die)
    assert pool(2).run(add_up, 2.0) == [6.0, 6.0]  # so that the new ones have imported all that they need
    with pytest.raises(WorkerError, match=r"no answer within 1 s from rank 1\n(.|\n)*in sleep_on_one"):
        pool(2).run(sleep_on_one, timeout=1)
    with pytest.raises(WorkerError, match=r"failed:(.|\n)*cannot pickle"):
        pool(2).run(lambda: dist.new_group())
    os.kill(pool(1).run(os.getpid)[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"rank 0 died \(exit code -9\)"):
        pool(1).run(os.getpid)
    assert pool(2).run(add_up, 1.0) == [3.0, 3.0]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Pool(0)


def alive(pid: int) -> bool:
    """Whether it runs still (a zombie does not)."""
    out = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(out) and not out.startswith("Z")


def test_processes_end_with_their_parent_even_if_it_is_killed_while_they_work() -> None:
    script = """
        import os, time
        from dsv3_book.parallel.workers import Pool
        pool = Pool(2)
        print(*pool.run(os.getpid), flush=True)
        pool.run(time.sleep, 60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_a_notebooks_own_function_runs_and_nothing_is_written_to_stderr() -> None:
    import nbclient
    import nbformat

    cells = [
        "import torch, torch.distributed as dist\nfrom dsv3_book.parallel.workers import Pool",
        "pool, factor = Pool(2), 10",
        "def f(x):\n    print('hello')\n    dist.all_reduce(x)\n    return factor * x",
        "print(pool.run(f, torch.ones(1)))",
        "pool.stop()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert [output.name for output in outputs] == ["stdout"]
    assert outputs[0].text == "rank 0: hello\nrank 1: hello\n[tensor([20.]), tensor([20.])]\n"
