"""The training loop: gradients over micro-batches, an optimiser step, a bias update, and what survives a stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3_book import checkpoint
from dsv3_book.model import Transformer
from dsv3_book.model.balance import max_violation, update_bias
from dsv3_book.model.transformer import Losses
from dsv3_book.optim import adamw, clip_by_global_norm, optimizer_tensors
from dsv3_book.parallel import DataParallel
from dsv3_book.train.config import TrainConfig
from dsv3_book.train.folder import RunFolder
from dsv3_book.train.metrics import Metrics
from dsv3_book.train.signals import stop_signals

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NonFinite(RuntimeError):
    """The loss or the gradient is infinite or not a number; the weights are as they were before that step."""


class Totals:
    """Sums over the step's micro-batches, kept as one vector so that one message sums them over all processes."""

    def __init__(self, routers: int, experts: int, device: torch.device) -> None:
        self.values = torch.zeros(4 + routers * experts, dtype=torch.float64, device=device)  # fp64 counts exactly
        self.losses: Float[Tensor, " 3"] = self.values[:3]  # main, MTP, balance: means over the step
        self.stop: Float[Tensor, ""] = self.values[3]  # how many processes were asked to stop
        self.load: Float[Tensor, "routers E"] = self.values[4:].view(routers, experts)

    def add(self, losses: Losses, micro_batches: int) -> None:
        """Adds one of the step's `micro_batches`."""
        self.losses += torch.stack(losses[:3]).detach() / micro_batches
        self.load += losses.load


class Trainer:
    """One run in one folder. `Trainer(config, parallel).run()` trains to the end, or to a stop, and can be repeated.

    What is kept between steps, and saved: `model` (weights and routing biases), `optimizer`, `step` (steps done) and
    `sequences` (sequences seen, which is the place in the data). All settings of a step follow from these.

    quiet: no progress on the screen (warnings are said all the same), for use in a program or a notebook.

    Raises, on every process and before anything is computed or overwritten:
        ValueError: the batch does not divide among the processes; the folder holds a run of another model, tokenizer or
            text, or only damaged checkpoints, or is in use; the text is too short.
        FileNotFoundError: a path of `--data` or the tokenizer is not there.
    """

    def __init__(self, config: TrainConfig, parallel: DataParallel | None = None, quiet: bool = False) -> None:
        self.parallel = parallel = parallel or DataParallel()
        self.config, self.recipe = config, config.recipe()
        self.folder = RunFolder(config, parallel, quiet)
        found = self.folder.find()
        self.data = self.folder.prepare(found)
        self.model = Transformer(config.model, seed=config.seed, compute_dtype=DTYPES[config.dtype]).to(parallel.device)
        if config.fp8:
            from dsv3_book.fp8.layers import use_fp8

            use_fp8(self.model)
        self.parameters = list(self.model.parameters())
        o = config.optim
        self.optimizer = adamw(self.model.named_parameters(), o.lr, o.betas, o.eps, o.weight_decay, config.moments)
        self.step = self.sequences = 0
        if found:
            self.load(*found)
        self.routers = self.model.routers()
        names = [name for name, _ in self.routers]
        self.metrics = Metrics(config.out if parallel.rank == 0 else None, config.steps, names, quiet)
        self.folder.write(self.data)

    def describe(self) -> str:
        """What is about to be done, in a line or two."""
        c, numbers = self.config, sum(p.numel() for p in self.parameters)
        if self.step == c.steps:
            return f"{c.out} is finished: all {c.steps} steps are done"
        begin = f"going on after step {self.step} of {c.steps}" if self.step else f"training {c.steps} steps"
        precision = f"{'fp8 products, ' if c.fp8 else ''}{c.dtype}, {c.moments} moments"
        return (
            f"{begin} in {c.out}: {numbers:,} parameters, {precision}, {self.parallel.size} process(es) on "
            f"{self.parallel.device.type} with {torch.get_num_threads()} thread(s) each"
        )

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
                stop = self.train_step(stop_asked) or self.step == self.config.pause_at
                last = self.step == self.config.steps
                if last or self.step % every.validation == 0:
                    self.validate(everything=last)
                if last or stop or self.step % every.checkpoint == 0:
                    self.save()
                if stop and not last:
                    return False
        return True

    def train_step(self, stop_asked: Callable[[], bool] = lambda: False) -> bool:
        """One optimiser step over `sequences` of the recipe; returns whether any process was asked to stop.

        The step's micro-batches are the same whatever the number of processes; each process takes its share of them.
        """
        began = time.perf_counter()
        now = self.recipe.at(self.step, self.tokens)
        micro_batches = now.sequences // self.config.batch.micro
        totals = Totals(len(self.routers), self.config.model.n_routed_experts, self.parallel.device)

        for number in self.parallel.share(micro_batches):
            losses = self.model.losses(self.micro_batch(number))
            total = losses.main + now.mtp_weight * losses.mtp + losses.balance
            (total / micro_batches).backward()
            totals.add(losses, micro_batches)
        self.parallel.sum_gradients(self.parameters)
        totals.stop += stop_asked()
        self.parallel.sum(totals.values)

        norm = clip_by_global_norm([(self.parameters, None)], self.config.optim.clip)
        self.require_finite(totals, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = now.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for (_, router), load in zip(self.routers, totals.load, strict=True):
            update_bias(router.e_score_correction_bias, load.float(), now.gamma)

        self.step += 1
        self.sequences += now.sequences
        violations = max_violation(totals.load)
        main, mtp, balance = totals.losses.tolist()
        seconds = time.perf_counter() - began
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
            "tokens_per_second": now.sequences * self.config.batch.sequence_length / seconds,
        }
        self.metrics.step(line, violations.tolist())
        return totals.stop.item() > 0

    def micro_batch(self, number: int) -> Int[Tensor, "B width"]:
        """Micro-batch `number` of the coming step: T inputs, their targets, and one more token per MTP depth."""
        T, B = self.config.batch.sequence_length, self.config.batch.micro
        length = T + 1 + self.config.model.num_nextn_predict_layers
        return self.data.train.sequences(self.sequences + number * B, B, length, stride=T).to(self.parallel.device)

    def require_finite(self, totals: Totals, norm: Tensor) -> None:
        """Raises NonFinite before a bad step touches the weights; every process sees the same numbers, so all stop."""
        main, mtp, balance = totals.losses.tolist()
        if not all(map(math.isfinite, (main, mtp, balance, norm.item()))):
            kept = checkpoint.found(self.folder.checkpoints)
            where = f"the last checkpoint is of step {kept[0][0]}" if kept else "there is no checkpoint yet"
            raise NonFinite(
                f"step {self.step + 1} is not finite (loss {main}, MTP loss {mtp}, balance loss {balance}, gradient "
                f"norm {norm.item()}), so it was not taken; {where}. Lower --optim.lr, or try --dtype fp32"
            )

    # Validation --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def validate(self, everything: bool = False) -> dict[str, Any]:
        """The main model's loss on held-out text, in nats per token and bits per byte, and a line of metrics.

        everything: all held-out text, beside what `xz -9e` needs for it; else `every.validation_windows` of it.
        """
        B, T = self.config.batch.micro, self.config.batch.sequence_length
        windows = None if everything else self.config.every.validation_windows
        sums = torch.zeros(3, dtype=torch.float64, device=self.parallel.device)  # nats, tokens, bytes
        for number, batch in enumerate(self.data.evaluation(B, T, max_windows=windows)):
            if number % self.parallel.size == self.parallel.rank:
                tokens = batch.tokens.to(self.parallel.device)
                hidden, _ = self.model.run_blocks(self.model.embed(tokens[:, :-1]))
                nats = self.model.token_loss(self.model.norm(hidden), tokens[:, 1:]).double() * batch.predicted
                sums += torch.stack([nats, nats.new_tensor(batch.predicted), nats.new_tensor(batch.bytes)])
        nats, tokens, size = self.parallel.sum(sums).tolist()
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "val_loss": nats / tokens,
            "val_bits_per_byte": nats / math.log(2) / size,
            "val_tokens": int(tokens),
        }
        if everything and self.parallel.rank == 0:
            line["val_xz_bits_per_byte"] = self.data.val_xz_bits_per_byte
        self.metrics.validation(line)
        return line

    # What survives -----------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds as tensors, by name; loading fills these same ones."""
        model = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        moments = optimizer_tensors(self.model.named_parameters(), self.optimizer)
        return model | {f"optimizer.{name}": value for name, value in moments.items()}

    def save(self) -> Path:
        """Writes a checkpoint of this moment."""
        state = {"sequences": self.sequences, "tokens": self.tokens, "data": self.data.fingerprint}
        # Nothing in training draws random numbers; the generator is saved so that what a reader adds may.
        rng = {f"rng.{self.parallel.rank}": torch.get_rng_state()}
        return self.folder.save(self.step, self.tensors() | rng, state)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Goes back to the moment of a checkpoint."""
        tensors, rng = self.tensors(), f"rng.{self.parallel.rank}"
        if rng in checkpoint.names(path):
            tensors[rng] = torch.get_rng_state()
        checkpoint.load(path, tensors, self.parallel)
        if rng in tensors:
            torch.set_rng_state(tensors[rng])
        self.step, self.sequences = state["step"], state["sequences"]
