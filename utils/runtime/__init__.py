"""Everything around the training step: processes, precision, counting, stopping, telling.

A script's loop stays visible; what would repeat in every loop is here. `run.steps` counts optimizer steps,
`run.backward` ends one, and `run.due`, `run.log` act only after a step that was completed.
"""

import atexit
import contextlib
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from utils import errors, launchers, randomness, results, weightwise, writing
from utils.arguments import length
from utils.report import curves
from utils.runtime import engines, failures, guard, memory, progress, signals, startup, trackers

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

LEFT = ("samples/", "test_samples/", "report.html")  # beside what was learned; pictures only where prompts were given

_current = None  # the run of this process: a notebook starts several, one after the other


def start(
    output_dir,
    *,
    seed: int | None = None,  # None: that of the resumed run, else a new one, which is printed and saved
    mixed_precision: str | None = None,  # None: what `accelerate launch` or its config says
    accumulate: int = 1,  # micro batches in an optimizer step
    report_to: str | list[str] | None = None,  # trackers: tensorboard, wandb, ..., all; None or "none": no tracker
    logging_dir: str = "logs",  # inside output_dir
    project: str = "diffusion-fine-tuning",
    config: dict | None = None,  # every option, written to training_config.yaml
    allow_tf32: bool = False,
    deterministic: bool = False,
    on_nan: str = "stop",  # or "skip": leave out optimizer steps whose gradients are not finite
    on_loss_spike: str = "warn",  # or "stop", "off": when the smoothed loss is far above its usual course
    max_minutes: float | None = None,
    resuming: str | None = None,  # what the run goes on from: latest, or a checkpoint
    compile: bool = False,  # also on when accelerate's own dynamo settings ask for it
    log_every: int = 1,  # optimizer steps between lines of metrics.jsonl
    wandb_exp: str | None = None,  # the run's name in wandb; None: wandb chooses
    wandb_dir: str | None = None,  # for wandb's files; None: logging_dir
) -> "Run":
    global _current
    close_last()
    errors.outlast_readers()
    startup.quiet()
    stop = signals.Stop(max_minutes)
    accelerator = startup.accelerator(mixed_precision, accumulate, report_to, Path(output_dir), logging_dir, compile)
    startup.refuse_lost_processes(accelerator.num_processes)
    startup.settle_arithmetic(allow_tf32, deterministic)
    told = {"on_nan": on_nan, "on_loss_spike": on_loss_spike, "log_every": log_every}
    run = Run(accelerator, Path(output_dir), stop, accumulate=accumulate, **told)
    run.resuming, run.config, run.trackers = resuming, dict(config or {}), None
    run.trackers = trackers.Trackers(accelerator, project, wandb_exp, wandb_dir)
    run.open(seed)
    _current = run
    stop.install()
    return run


def close_last() -> None:
    """A run that an exception broke off in a notebook still holds its folder."""
    if _current is not None:
        _current.close()


class Run:
    """One training run in one process; `start` makes it."""

    def __init__(
        self, accelerator, output_dir: Path, stop, *, accumulate=1, on_nan="stop", on_loss_spike="warn", log_every=1
    ):
        self.accelerator, self.output_dir, self.stop = accelerator, output_dir, stop
        self.accumulation, self.log_every = accumulate, log_every
        self.device, self.rank, self.world = accelerator.device, accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        self.dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)  # of weights that do not learn
        self.seed, self.resuming, self.config = None, None, {}
        self.step = 0  # optimizer steps that are completed
        self.first_step = 0  # those of earlier sessions
        self.updating = threading.Lock()  # held while the weights are of no step
        self.progress = 0  # grows with whatever this process does
        self.in_phase = False  # then it may stay as it is for long: an image is drawn, a large checkpoint is written
        self.total = None  # None until training begins
        self.clock, self.metrics = progress.Clock(), progress.Metrics(output_dir)
        self.session = {"began": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.trackers = trackers.Trackers(accelerator, "")
        self.lock = startup.FolderLock(output_dir)
        self.guard = guard.Guard(output_dir, on_nan, self.is_main, self.world, on_loss_spike)
        self._unreadable: set[str] = set()  # complaints: of such a picture the run ends before the step under way
        self._agreed = 0  # the exit code that all processes agreed to stop with
        self.engine = engines.made_for(accelerator, accumulate)
        self._wrapped, self._parameters = {}, None  # modules as prepared; (learns, its parameters)
        self._fused = None  # the optimizer's step inside the backward pass
        self._against_zero = True  # whether the loss of zeros tells a diverging run
        self._losses, self._examples = None, []  # of the optimizer step under way
        self.told = {}  # loss, gradient norm, learning rate, seconds of the last completed step
        self._line = None

    # Beginning and end

    def open(self, seed: int | None) -> None:
        """The main process takes the folder and settles the seed; what it found holds for all."""
        found = {}
        if self.is_main:
            try:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                if owner := self.lock.take():
                    found["problem"] = f"{owner} is training in it. Choose another folder, or wait for its end."
                else:
                    writing.sweep(self.output_dir)
                    if results.complete(self.output_dir):
                        self.say(f"{self.output_dir}: completed the result that an earlier run was replacing")
                    found["seed"] = startup.settle_seed(seed, self.output_dir, self.resuming)
            except OSError as problem:
                found["problem"] = f"cannot be written: {problem.strerror}."
        if self.world > 1:
            shared = [found]
            torch.distributed.broadcast_object_list(shared, src=0)
            found = shared[0]
        if "problem" in found:
            if self.is_main:
                errors.refuse(f"--output_dir {self.output_dir}: {found['problem']}")
            raise SystemExit(errors.OPTIONS)
        self.seed = found["seed"]
        if "seed" in self.config or seed is None:
            self.config["seed"] = self.seed
        if self.is_main and not self.resuming:  # when resuming, only after the checkpoint was found to fit
            startup.write_settings(self.output_dir, self.config)
        atexit.register(self.close)

    def finish(self, code: int = 0) -> int:
        """Call last, or when `stopping` and the checkpoint is written. Leaves with `code`, that of an early stop, or
        that of a run that is done and has diverged."""
        stopped = self.stopping
        if stopped:
            code = self._agreed or self.stop.code
        elif self.diverged:
            code = errors.DIVERGED
        if stopped and self.total is not None:
            self.say(
                f"stopped after step {self.step} of {self.total}; run the same command with "
                "--resume_from_checkpoint latest to go on"
            )
        self.close()
        launchers.last_words(code)
        if self.world > 1:
            startup.leave(code)
        if code:
            raise SystemExit(code)
        return code

    def close(self, broken: bool = False) -> None:
        """broken: another process is gone, and what is taken down together would wait for it."""
        global _current
        if _current is self:
            _current = None
        atexit.unregister(self.close)
        if self._line:
            self._line.clear()
        if self.lock is None:
            return
        if self.is_main:
            if lost := errors.lost_output():
                self.session["lost_output"] = lost
            with contextlib.suppress(OSError):  # a full disk
                self.write_timings()
        self.metrics.close()
        self.trackers.close()
        if not broken:
            self.engine.close()
            self.accelerator.state.destroy_process_group()
        self.stop.restore()
        self.lock.release()
        self.lock = None

    def say(self, text: str) -> None:
        """One line, from the main process only."""
        if self.is_main:
            if self._line:
                self._line.clear()
            print(text, flush=True)

    @property
    def diverged(self) -> str | None:
        """In words, where the run has diverged and has not recovered."""
        return str(self.guard.divergence) if self.guard.divergence.diverged else None

    def done(self, learned: str) -> None:
        """The last line of a run: what can be looked at now."""
        self.session["finished"] = True
        if self.diverged:
            self.session["diverged"] = self.diverged
        if self.is_main:
            with contextlib.suppress(OSError):
                self.write_timings()  # an upload looks there
        *held, last = [learned, *(name for name in LEFT if (self.output_dir / name).exists())]
        told = f"diverged: {self.diverged}; lower --learning_rate and train again." if self.diverged else "done:"
        self.say(f"{told} '{self.output_dir}' holds {', '.join(held)}{' and ' * bool(held)}{last}")

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    # Failing

    def saving_first(self, saved):
        """Around the loop and the final save: an error inside ends the run, and what it has learned is saved before."""
        return failures.saving_first(self, saved)

    @property
    def learned(self) -> bool:
        """Something would be lost."""
        return self.step > self.first_step

    def save_result(self, learns, save: Callable[[Path], None]) -> None:
        """`save(folder)` writes what was learned; it replaces an earlier result as a whole, if its weights are
        numbers."""
        if not self.is_main:
            return
        for name, weight in learns.named().items():
            if not torch.isfinite(weight).all():
                errors.refuse(
                    f"--output_dir {self.output_dir}: {name} holds NaN or inf after step {self.step}, so this is not "
                    "saved as the result; an earlier result is untouched. Resume from an older checkpoint with a lower "
                    "--learning_rate.",
                    errors.DIVERGED,
                )
        with results.replacing(self.output_dir) as folder:
            save(folder)

    def keep_folder(self) -> None:
        """The output folder may be renamed or removed while the run goes on: then it is made anew, with what this
        process still knows."""
        if not self.is_main or self.lock is None:
            return
        if self.lock.holds():
            self.metrics.restore()
            return
        self.lock.release()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if owner := self.lock.take():
            taken, self.output_dir = self.output_dir, self.output_dir.with_name(f"{self.output_dir.name}-{os.getpid()}")
            errors.refuse(f"--output_dir {taken}: was renamed or removed, and {owner} is training in it", errors.FAILED)
        if not (self.output_dir / startup.SETTINGS).is_file():
            errors.warn(
                f"{self.output_dir} was renamed or removed during the run. It is created again with the settings and "
                "metrics of this run; checkpoints and images from before are missing from it."
            )
            startup.write_settings(self.output_dir, self.config)
            self.metrics.reopen()

    # Stopping

    @property
    def compiles(self) -> bool:
        """torch.compile works on what learns, by our option or by accelerate's own settings."""
        return self.accelerator.state.dynamo_plugin.backend.value != "NO"

    @property
    def interrupted(self) -> bool:
        """This process was asked to stop: long phases look here and break off. Others may not know of it yet."""
        return self.stop.requested()

    @property
    def stopping(self) -> bool:
        """The run ends early, and all processes know it. After the last step there is nothing left to stop."""
        if self.total is not None and self.step >= self.total:
            return False
        return bool(self._agreed) or ((self.world == 1 or self.total is None) and self.interrupted)

    @contextlib.contextmanager
    def phase(self, name: str):
        """A long piece of work outside the steps. Before training, a stop that came in it ends the run after it."""
        if self._line:
            self._line.clear()
        self.progress += 1
        self.keep_folder()
        self.in_phase = True
        try:
            with self.clock.phase(name):
                yield
        finally:
            self.in_phase = False
            self.progress += 1
        if self.total is None and self.interrupted:
            self.say(f"stopped during {name}")
            self.finish()

    @property
    def phases(self) -> dict[str, float]:
        return self.clock.phases  # name -> seconds

    def write_timings(self) -> None:
        """timings.json: one entry a session, this one so far."""
        told = {**self.session, "last_step": self.step, **self.clock.summary(self.device)}
        progress.write_timings(self.output_dir, told, bool(self.resuming))

    # Training

    def length(self, args, photos: int, epoch: int, examples_per_step: int) -> int:
        """Steps in all: as given, by epochs of `epoch` examples, or from the table where a dataset held the photos."""
        if told := length.settle(args, photos, examples_per_step):
            self.say(told)
            self.config["max_train_steps"] = args.max_train_steps
            if self.is_main and not self.resuming:  # when resuming, `steps` writes them
                startup.write_settings(self.output_dir, self.config)
        return args.max_train_steps or math.ceil(args.num_train_epochs * epoch / examples_per_step)

    def prepare(self, family, learns, optimizer, fused_backward: bool = False):
        """Only what learns is wrapped (precision, several processes, compilation); data and schedule are ours."""
        if fused_backward:
            self._fused = weightwise.FusedBackward(optimizer, self.seed)
        self._wrapped, optimizer = self.engine.prepare(learns.modules, optimizer)
        for name, module in self._wrapped.items():
            family.use(name, module)
        # A network that first has to learn what it predicts may be as bad as zeros for long, and is not diverging.
        self._against_zero = not getattr(family, "retargeted", False)
        return optimizer

    def whole(self):
        """Around what reads whole weights (samples, files), by all processes: inside, sharded ones are whole."""
        return self.engine.whole()

    @property
    def scaler(self):
        """The fp16 loss scale, None otherwise: part of what a checkpoint must hold."""
        return self.accelerator.scaler

    def steps(self, loader, first_step: int, total: int):
        """(step, batch) for every micro batch after `first_step` completed steps; step counts from 1."""
        self._begin(first_step, total)
        batches = iter(loader)
        with contextlib.suppress(KeyboardInterrupt):  # only where our handlers could not be installed
            while self.step < total and not self.stopping:
                step = self.step + 1
                self._losses, self._examples = None, []
                for micro in range(self.accumulation):
                    batch = next(batches, None)
                    if batch is None:
                        raise RuntimeError("the data ended before the training: the loader must be endless")
                    self._name_unreadable(batch.pop("lost", ()))
                    # Identities stay behind: noise is drawn by them here, and fetching them back would wait.
                    batch = {name: v if name == "ids" else self._to_device(v) for name, v in batch.items()}
                    self._examples.append({name: batch.get(name) for name in ("ids", "keys")})
                    randomness.seed_step(self.seed, step - 1, micro, self.rank)
                    self.progress += 1
                    yield step, batch
                if self.step != step and not self.stopping:
                    raise RuntimeError("run.backward was not called for every batch")
            return
        self.stop.reason = self.stop.reason or "SIGINT"

    def _begin(self, first_step: int, total: int) -> None:
        self.step, self.first_step, self.total = first_step, first_step, total
        self.engine.begin()
        self.accelerator.step = 0  # a loop that was broken off in a notebook may have left it in mid-step
        self.session["first_step"] = first_step
        self.guard.recall(self.metrics.path, first_step)
        if self.is_main:
            if self.resuming:
                startup.write_settings(self.output_dir, self.config)
            self.metrics.open(first_step)
            _, losses, _ = curves.series(curves.read_metrics(self.metrics.path), "loss")
            self._line = progress.Line(first_step, total, self.device, losses=losses)
        self.trackers.start(self.config)
        if first_step >= total:
            self.say(f"already complete: {first_step} steps are done, {total} were asked for")
        self.clock.begin()

    def _name_unreadable(self, complaints: Iterable[str]) -> None:
        """Each picture once; it may be in several micro batches."""
        for complaint in dict.fromkeys(complaints):
            if complaint not in self._unreadable:
                errors.warn(complaint, everywhere=True)
        self._unreadable.update(complaints)

    def _to_device(self, value):
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    @contextlib.contextmanager
    def accumulate(self, learns):
        """Around forward and backward: processes exchange gradients in the last micro batch of a step only."""
        with memory.told(self.config, self.device, self.step + 1):
            with self.accelerator.accumulate(*self._wrapped.values()):
                yield

    def backward(
        self,
        loss,
        learns,
        optimizer,
        schedule=None,
        *,
        max_norm: float | None = 1.0,
        parts: dict | None = None,  # of the loss: name -> losses.Part; logged where there are several
        zero: torch.Tensor | None = None,  # losses.against_zero: whether the run diverges
        **facts,
    ) -> None:
        """Backward; in the last micro batch also guard, clip, step, schedule and zero.

        The one moment per optimizer step at which the host waits for the device: loss, gradient norm and the wish
        to stop are fetched together. `facts` (timesteps, error per example) are looked at only if the guard fires.
        """
        parts, zero = parts or {}, zero if self._against_zero else None
        if self._fused:  # each weight is stepped as soon as its gradient is there
            self.updating.acquire()
            self._fused.begin(self.step + 1, loss, bool(self._unreadable))
        self.engine.backward(loss)  # divides by the accumulation steps
        told = [loss.detach() / self.accumulation, *(value for part in parts.values() for value in part)]
        told += [] if zero is None else zero.unbind()
        told = torch.stack([value.detach().float() for value in told])
        self._losses = told if self._losses is None else self._losses + told
        if facts and self._examples:
            self._examples[-1] |= facts
        if not self.accelerator.sync_gradients:
            return
        if self._parameters is None or self._parameters[0] is not learns:
            self._parameters = (learns, list(learns.parameters()))
        parameters = self.engine.holders(self._parameters[1], optimizer)
        if self.scaler is not None:
            self.scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
        norm = (self._fused.norm() if self._fused else guard.gradient_norm(parameters)).to(self.device)
        loss, sums, size, self._agreed, unreadable = self._agree(self._losses, norm)
        if unreadable:  # what this step saw is not what was asked for: it is left out, and the run ends before it
            self._agreed = errors.DATA
            if self._fused:
                self.updating.release()
            return
        rates = _rates(optimizer.param_groups)
        against_zero = _ratio(*sums[2 * len(parts) :])  # the parts' numbers come first

        stepped = self.guard.allows(self.step + 1, loss, size, self.scaler is not None, self._examples)
        spike = self.guard.spike(self.step + 1, loss)
        self.guard.diverges(self.step + 1, against_zero)
        if stepped and max_norm and size > max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        if not self._fused:
            self.updating.acquire()
        if stepped:
            self.engine.step(optimizer)
        else:
            self.engine.skip(optimizer)
        if schedule is not None:
            with warnings.catch_warnings():  # its complaint about a first step that was left out
                if not stepped:
                    warnings.simplefilter("ignore")
                schedule.step()
        measured = _means(parts, sums) | ({} if zero is None else {"against_zero": against_zero})
        self._complete(loss, measured, size, rates, stepped, spike)

    def _agree(self, losses: torch.Tensor, norm: torch.Tensor) -> tuple[float, list[float], float, int, bool]:
        """Mean loss, sums over its parts, gradient norm (equal everywhere: gradients were averaged), the highest stop
        code, and whether some process could not read a picture."""
        facts = [self.stop.code if self.interrupted else 0, bool(self._unreadable)]
        own = [norm.float(), *losses.unbind()]
        if self.world == 1:
            norm, loss, *sums = torch.stack(own).tolist()
            return loss, sums, norm, *facts
        own = torch.stack([*(torch.full_like(losses[0], fact) for fact in facts), *own])
        everyone = [torch.empty_like(own) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, own)
        codes, unreadable, norms, *sums = torch.stack(everyone).T.tolist()
        loss, *sums = map(math.fsum, sums)
        return loss / self.world, sums, norms[0], int(max(codes)), any(unreadable)

    def _complete(self, loss, parts: dict, norm, rates: dict, stepped: bool, spike: float | None) -> None:
        seconds = self.clock.step()
        self.step += 1
        self.progress += 1
        self.updating.release()
        self.told = {"loss": loss, **parts, "grad_norm": norm, **rates, "seconds": round(seconds, 5)}
        if not stepped:
            self.told["skipped"] = 1
        if spike is not None:
            self.told["spike"] = round(spike, 2)
        if self._line:
            self._line.step(self.step, loss, seconds, rates["lr"])

    # Telling

    def due(self, step: int, every: int | None) -> bool:
        """After every `every`-th optimizer step that was completed; None or 0: never."""
        return bool(every) and step == self.step and step % every == 0

    def log(self, step: int, **values) -> None:
        """Writes loss and its parts, grad_norm, lr, seconds and `values` (numbers or tensors) of a completed step."""
        if not self.is_main or step != self.step or (step % self.log_every and step != self.total):
            return
        told = {**self.told, **{name: float(value) for name, value in values.items() if value is not None}}
        self.metrics.write(step, told)
        self.trackers.log(told, step)

    def also(self, step: int, **values: float | None) -> None:
        """What is measured beside the steps (a validation loss); None is left out."""
        values = {name: value for name, value in values.items() if value is not None}
        if self.is_main and values:
            self.metrics.write(step, values)
            self.trackers.start(self.config)
            self.trackers.log(values, step)

    def log_images(self, step: int, images: dict[str, list]) -> None:
        """name -> PIL images, for the trackers that show pictures."""
        self.trackers.start(self.config)
        self.trackers.log_images(images, step)


def _means(parts: Iterable[str], sums: list[float]) -> dict[str, float]:
    """(sum, how many batches it is of) of each part => its mean, if some batch had it. One alone is the loss itself."""
    found = {f"loss_{name}": total / n for name, total, n in zip(parts, sums[::2], sums[1::2]) if n}
    return found if len(found) > 1 else {}


def _ratio(loss: float = math.nan, of_zero: float = math.nan) -> float:
    """Sums over the micro batches and processes of a step; where nothing counts (empty masks) there is no ratio."""
    return loss / of_zero if of_zero else math.nan


def _rates(groups: list[dict]) -> dict[str, float]:
    """The learning rate of each group of weights: lr is the first's, lr_text_encoder that of a group of this name."""
    names = ["lr", *(f"lr_{group.get('name', number)}" for number, group in enumerate(groups[1:], start=1))]
    return {name: float(group["lr"]) for name, group in zip(names, groups)}
