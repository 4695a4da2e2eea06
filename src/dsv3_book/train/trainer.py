"""The training loop: a pipeline's step, an optimiser's step, a bias update, and what survives a stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3_book import checkpoint
from dsv3_book.checkpoint import SaveError
from dsv3_book.model import Transformer
from dsv3_book.model.balance import max_violation, update_bias
from dsv3_book.parallel import DataParallel
from dsv3_book.pipeline.executor import Watch
from dsv3_book.saver import Saver
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.folder import RunFolder
from dsv3_book.train.job import DTYPES, assemble
from dsv3_book.train.logs import close_log, rank_log
from dsv3_book.train.metrics import Metrics, Unwritable
from dsv3_book.train.nonfinite import LIMIT, NonFinite, examine, finite, finite_line, last_checkpoint
from dsv3_book.train.profile import write_profile
from dsv3_book.train.recipe import Settings
from dsv3_book.train.signals import stop_signals
from dsv3_book.train.speed import peak_flops, peak_memory, train_flops_per_token
from dsv3_book.train.swaps import load_swaps
from dsv3_book.train.totals import Totals
from dsv3_book.train.validation import held_out_loss


class Trainer:
    """One run in one folder. `Trainer(config, parallel).run()` trains to the end, or to a stop, and can be repeated.

    What is kept between steps, and saved: `job` (weights, routing biases, the optimiser's state, the average of the
    weights), `step` (steps done) and `sequences` (sequences seen, which is the place in the data). All settings of a
    step follow from these.

    quiet: no progress on the screen (warnings are said all the same), for use in a program or a notebook.

    Raises, on every process and before anything is computed or overwritten:
        ValueError: layers, experts or batch don't divide among the processes; the folder holds a run of another model,
            tokenizer or text, or only damaged checkpoints, or is in use; the text is too short.
        FileNotFoundError: a path of `--data` or the tokenizer is not there.
    """

    def __init__(self, config: TrainConfig, parallel: DataParallel | None = None, quiet: bool = False) -> None:
        self.parallel = parallel = parallel or DataParallel()
        self.config, self.recipe = config, config.recipe()
        self.folder = RunFolder(config, parallel, quiet)
        found = self.folder.find()
        self.swaps = load_swaps(config.swap, config.model, DTYPES[config.dtype], config.parallel.zero)
        parallel.require_same("the files that --swap names", self.swaps.fingerprints())
        if found:
            for note in self.swaps.same_as(found[1].get("swaps", {}), config.out):
                self.folder.say(f"note: {note}")
        self.data = self.folder.prepare(found)
        self.job = assemble(config, parallel, self.swaps)
        self.pipeline, self.optimizer, self.ema = self.job.pipeline, self.job.optimizer, self.job.ema
        self.dp, self.place = self.job.mesh.layout.dp, self.job.mesh.index("dp")
        for size in config.batch.sizes():  # a schedule that can't be made is better known now than in a month
            self.job.schedule(size // (config.batch.micro * self.dp))
        self.step = self.sequences = self.skipped = 0  # skipped: steps not taken since the last that was
        torch.manual_seed(config.seed + parallel.rank)  # for what a reader adds: torch's own beginning is random
        if found:
            self.load(*found)
        elif config.init is not None:
            self.job.begin_with(config.init, parallel)
        self.saver = Saver(self.folder.checkpoints, parallel, config.every.keep, config.parallel.timeout)
        names = self.pipeline.router_names()
        self.metrics = Metrics(config.out if parallel.rank == 0 else None, config.steps, names, quiet)
        self.warned: SaveError | None = None
        self.log = rank_log(config.out, parallel.rank)
        self.flops = train_flops_per_token(config.model, config.batch.sequence_length)
        self.peak = peak_flops(parallel.device, DTYPES[config.dtype], config.fp8)
        self.folder.write(self.data)
        self.log.info(self.describe())

    def describe(self) -> str:
        """What is about to be done, in a line or two."""
        c, layout = self.config, self.job.mesh.layout
        if self.step == c.steps:
            return f"{c.out} is finished: all {c.steps} steps are done"
        begin = f"going on after step {self.step} of {c.steps}" if self.step else f"training {c.steps} steps"
        precision = f"{'fp8 products, ' if c.fp8 else ''}{c.dtype}, {c.moments} moments"
        shared = f" (pp {layout.pp} by {c.schedule}, dp {layout.dp}, ep {layout.ep})" if self.parallel.size > 1 else ""
        return (
            f"{begin} in {c.out}: {self.job.numbers():,} parameters, {precision}, {self.parallel.size} "
            f"process(es){shared} on {self.parallel.device.type} with {torch.get_num_threads()} thread(s) each"
        )

    @property
    def model(self) -> Transformer:
        """The whole model, where this process holds it (`Job.model`)."""
        return self.job.model

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return self.sequences * self.config.batch.sequence_length

    # The loop ----------------------------------------------------------------------------------------------------
    def run(self) -> bool:
        """Trains until the last step, Ctrl-C, SIGTERM or `pause_at`; True when the run is finished."""
        every = self.config.every
        with self.metrics.after(self.step), stop_signals() as stop_asked:
            while self.step < self.config.steps:
                stop = self.train_step(lambda: stop_asked() or self.metrics.problem is not None)
                stop = stop or self.step == self.config.pause_at
                last = self.step == self.config.steps
                if last or self.step % every.validation == 0:
                    self.validate(everything=last)
                if last or stop or self.step % every.checkpoint == 0:
                    self.save()
                self.warn()
                if stop or last:
                    break
            self.saver.wait()
        if self.metrics.problem is not None:
            raise Unwritable(self.metrics.problem, self.config.out, self.step)
        return self.step == self.config.steps

    def train_step(self, stop_asked: Callable[[], bool] = lambda: False) -> bool:
        """One optimiser step over `sequences` of the recipe; returns whether any process was asked to stop.

        The step's micro-batches are the same whatever the layout: each of the dp pipelines takes its share of them.
        """
        began = time.perf_counter()
        now = self.recipe.at(self.step, self.tokens)
        micro_batches = now.sequences // self.config.batch.micro
        M = micro_batches // self.dp

        watch = Watch() if self.step + 1 == self.config.profile else None
        if self.job.transport is not None:
            self.job.transport.events.clear()  # validation has all-to-alls too
        self.pipeline.follow(self.job.schedule(M))
        mine = [self.micro_batch(self.place * M + number) for number in range(M)]
        losses = self.pipeline.step(mine, now.mtp_weight, of=micro_batches, watch=watch, sum_copies=False)
        self.optimizer.reduce()
        norm = self.optimizer.clip(self.config.optim.clip)
        waited = self.pipeline.waited
        notes = stop_asked(), waited, peak_memory(self.parallel.device)
        totals = Totals(losses, self.config.parallel.pp, *notes, self.parallel)
        taken = self.take(now, mine, totals, norm)

        self.step += 1
        self.sequences += now.sequences
        seconds = time.perf_counter() - began
        line = self.line(now, totals, norm, seconds)
        self.metrics.step(line if taken else finite_line(line), totals.load)
        self.log.info("step %d: %.3f s, %.3f of them waiting", self.step, seconds, waited)
        if taken:  # else what found the culprit is among the messages
            self.write_profile(watch)
        return totals.stop > 0

    def micro_batch(self, number: int) -> Int[Tensor, "B width"]:
        """Micro-batch `number` of the coming step: T inputs, their targets, and one more token per MTP depth."""
        T, B = self.config.batch.sequence_length, self.config.batch.micro
        length = T + 1 + self.config.model.num_nextn_predict_layers
        return self.data.train.sequences(self.sequences + number * B, B, length, stride=T).to(self.parallel.device)

    def update(self, now: Settings, totals: Totals) -> None:
        """The weights by their gradients, their average, and the routing biases by the whole step's load."""
        for group in self.optimizer.param_groups:
            group["lr"] = now.lr
        if self.ema is not None:
            self.ema.before_step()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        for place, router in self.job.routers():
            if (bias := getattr(router, "e_score_correction_bias", None)) is not None:
                (self.swaps.balance or update_bias)(bias, totals.load[place].float(), now.gamma)

    def line(self, now: Settings, totals: Totals, norm: Tensor, seconds: float) -> dict[str, Any]:
        """What metrics.jsonl says of the step just done."""
        main, mtp, balance = totals.losses.tolist()
        violations = max_violation(totals.load)
        speed = now.sequences * self.config.batch.sequence_length / seconds
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": main,
            "loss_mtp": mtp,
            "balance_loss": balance,
            "max_violation": violations.mean().item() if len(violations) else 0.0,  # over all routers, MTP's included
            "grad_norm": norm.item(),
            "lr": now.lr,
            "gamma": now.gamma,
            "mtp_weight": now.mtp_weight,
            "batch_size": now.sequences,
            "tokens_per_second": speed,
            "memory": totals.memory,
        }
        if self.parallel.device.type == "cpu":  # with NCCL it is the GPU that waits, unseen from here
            line["bubble"] = totals.waited / seconds
        if self.peak:
            line["mfu"] = speed * self.flops / (self.peak * self.parallel.size)
        return line

    def write_profile(self, watch: Watch | None) -> None:
        """The step just done as a trace, if it was watched."""
        messages = self.job.transport.events if self.job.transport is not None else []
        if watch is not None:
            layout, rank = self.job.mesh.layout, self.parallel.rank
            label = ", ".join(f"{group} {layout.index(group, rank)}" for group in ("pp", "dp", "ep"))
            actions = self.pipeline.schedule.actions[self.pipeline.rank]
            path = self.config.out / "profile" / f"step-{self.step}.json"
            said = f"step {self.step} as a trace: {path} (open it at ui.perfetto.dev)"
            try:
                write_profile(path, label, actions, watch, messages)
            except OSError as error:  # rank 0's only, when all have told it: a trace is not worth a run
                said = f"warning: no trace of step {self.step}: {error}"
            self.folder.say(said)

    def take(self, now: Settings, mine: list[Tensor], totals: Totals, norm: Tensor) -> bool:
        """Updates the weights, unless something of the step is not finite: then they stay as they are.

        Raises NonFinite if the run is to stop at that; every process sees the same numbers, so all do.
        """
        if finite((totals.losses, norm)):
            self.update(now, totals)
            self.skipped = 0
            return True
        self.skipped += 1
        said = examine(self, now, mine, totals, norm)
        if self.config.on_nonfinite == "stop" or self.skipped == LIMIT:
            raise NonFinite(
                f"{said}; {last_checkpoint(self.folder.checkpoints)}. Lower --optim.lr, or try --dtype fp32"
            )
        self.folder.say(f"warning: {said}. Going on without it")
        return False

    def validate(self, everything: bool = False) -> dict[str, Any]:
        """The main model's loss on held-out text, in nats per token and bits per byte, and a line of metrics; beside
        it the loss of the averaged weights.

        everything: all held-out text, beside what `xz -9e` needs for it; else `every.validation_windows` of it.
        """
        B, T = self.config.batch.micro, self.config.batch.sequence_length
        windows = None if everything else self.config.every.validation_windows

        def loss() -> tuple[float, float, int]:
            batches = self.data.evaluation(B, T, max_windows=windows)
            return held_out_loss(self.pipeline, self.job.mesh, batches, self.parallel)

        nats, bits, count = loss()
        line: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "val_loss": nats, "val_bits_per_byte": bits}
        line["val_tokens"] = count
        if self.ema is not None:
            with self.ema.swapped(self.optimizer.gather_weights):
                line["val_loss_ema"] = loss()[0]
        if everything and self.parallel.rank == 0:
            line["val_xz_bits_per_byte"] = self.data.val_xz_bits_per_byte
        self.metrics.validation(line)
        return line

    def close(self) -> None:
        """Lets others have the folder, and ends what runs beside the loop."""
        self.saver.close()
        self.job.close()
        self.folder.release()
        close_log()

    # What survives -----------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Any]:
        """Everything a checkpoint holds as tensors, by name; loading fills these same ones."""
        return self.job.tensors()

    def save(self) -> None:
        """Begins to write a checkpoint of this moment; training goes on meanwhile.

        A save that fails is a warning only, and the next one is tried as usual: what was saved before stays good.
        """
        counts = {"sequences": self.sequences, "tokens": self.tokens, "skipped": self.skipped}
        state = self.folder.state(self.data, swaps=self.swaps.fingerprints(), **counts)
        # Training draws no random numbers; the generator is saved for parts that a reader plugs in.
        rng = {f"rng.{self.parallel.rank}": torch.get_rng_state()}
        try:
            self.saver.wait()
        except SaveError as error:
            self.warn(error)
        self.saver.start(self.step, self.tensors() | rng, state)
        self.log.info("saving the checkpoint of step %d", self.step)

    def warn(self, problem: SaveError | None = None) -> None:
        """Tells once of a save that failed, as soon as it is known."""
        problem = problem or self.saver.problem()
        if problem is not None and problem is not self.warned:
            self.folder.say(f"warning: {problem}")
            self.warned = problem

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Goes back to the moment of a checkpoint, which another layout may have written."""
        tensors, rng = self.tensors(), f"rng.{self.parallel.rank}"
        if rng in checkpoint.names(path):
            tensors[rng] = torch.get_rng_state()
        checkpoint.load(path, tensors, self.parallel)
        if rng in tensors:
            torch.set_rng_state(tensors[rng])
        self.job.filled()
        self.step, self.sequences, self.skipped = state["step"], state["sequences"], state.get("skipped", 0)
