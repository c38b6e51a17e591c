"""DeepSpeed's ZeRO-2 on one GPU: what the optimizer needs is in main memory."""

import contextlib
import logging

import torch

from utils import errors

BUCKET = 2**25  # weights whose gradients DeepSpeed collects before it moves them: its own default is 2 GB in fp32
UNTOUCHED = {  # of a DeepSpeed file, what these scripts set by their own options, or do not use
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("fp16", "bf16", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "zero_optimization"),
}


def settings(world: int) -> dict:
    """DeepSpeed's ZeRO section as accelerate understands its variables and files; refused if it cannot be honoured."""
    from accelerate.utils import DeepSpeedPlugin

    try:
        config = DeepSpeedPlugin().deepspeed_config
    except (ValueError, OSError) as problem:
        errors.refuse(f"accelerate refuses its DeepSpeed settings: {problem}")
    zero = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
    zero.pop("offload_param", None)  # ZeRO-2 has nothing of this name to offload
    zero = {name: value for name, value in zero.items() if not name.startswith("stage3_")}
    ours = "accelerate_configs/deepspeed_zero2_offload.yaml shows what works"
    if world > 1:
        errors.refuse(
            f"accelerate is set to DeepSpeed with {world} processes; here it serves one GPU with little memory. On "
            "several GPUs use accelerate_configs/multi_gpu.yaml, or fsdp2.yaml where memory is short",
            once=True,
        )
    if zero.get("stage") not in (1, 2):
        errors.refuse(f"DeepSpeed's zero_stage is {zero.get('stage')}; one process has nothing to share: use 2; {ours}")
    if (zero.get("offload_optimizer") or {}).get("device") != "cpu":
        errors.refuse(f"DeepSpeed's offload_optimizer_device must be cpu: without it nothing is saved; {ours}")
    if unknown := sorted(config.keys() - UNTOUCHED):
        errors.refuse(f"DeepSpeed's settings hold {', '.join(unknown)}, which the options of the script say; {ours}")
    return {"reduce_bucket_size": BUCKET, "overlap_comm": False} | zero


class Offloaded:
    """DeepSpeed's ZeRO-2 with offloading: gradients, the optimizer's state and its step live in main memory.

    Weights that learn stay on the device in fp32, as without it, so averages, samples and files are made as ever.
    DeepSpeed sees the weights and the loss only, never the networks, so one engine serves several of them.
    """

    def __init__(self, accelerator, accumulate: int, zero: dict):
        self.accelerator, self.accumulate, self.zero = accelerator, accumulate, zero
        self.engine, self.shapes = None, []

    def prepare(self, modules, optimizer):
        self.shapes = [[weight.shape for weight in group["params"]] for group in optimizer.param_groups]
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        config = {
            "train_micro_batch_size_per_gpu": 1,  # only reported by it
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": 0.0,  # its default is 1; Run.backward clips
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own Adam would be compiled first
            "zero_optimization": self.zero,
            "steps_per_print": 10**12,
        }
        deepspeed = self._library()
        from accelerate.utils import patch_environment

        with patch_environment(LOCAL_RANK="0"):  # DeepSpeed insists on a launcher
            self.engine, *_ = deepspeed.initialize(model=LossAlone(weights), optimizer=optimizer, config=config)
        optimizer.register_state_dict_post_hook(self._by_weight)
        optimizer.register_load_state_dict_pre_hook(self._in_rows)
        prepare = self.accelerator.prepare_model  # "evaluation": precision and compilation, but not DDP
        return {name: prepare(module, evaluation_mode=True) for name, module in modules.items()}, optimizer

    def _library(self):
        try:
            import deepspeed
        except ImportError:
            errors.refuse("accelerate is set to DeepSpeed, which is not installed: pip install deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__ = {}  # else it tries a compiler, for what several processes would use
        if not torch.distributed.is_initialized():
            backend = "nccl" if self.accelerator.device.type == "cuda" else "gloo"
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return deepspeed

    def begin(self) -> None:
        self.engine.optimizer.refresh_fp32_params()  # its own copy of the weights, which a resume has changed

    def backward(self, loss):
        self.engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        if (scaler := self.accelerator.scaler) is not None:
            loss = scaler.scale(loss)
        self.engine.backward(self.engine(loss))  # divides by the accumulation steps

    def holders(self, parameters, optimizer):
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # gradients may still be on their way
        return [row for group in optimizer.param_groups for row in group["params"]]

    def step(self, optimizer):
        self.engine.step()  # steps `optimizer`, copies the weights back, clears the gradients
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    def skip(self, optimizer):
        zero = self.engine.optimizer
        checked, zero.check_grad_overflow, zero.local_overflow = zero.check_grad_overflow, True, True
        self.step(optimizer)  # finds an overflow, and so only clears the gradients
        zero.check_grad_overflow = checked

    def _by_weight(self, optimizer, state: dict) -> dict:
        """A row for each group => the state of each weight, as every other checkpoint has it."""
        by_weight, groups = {}, []
        for group, shapes in zip(state["param_groups"], self.shapes):
            (row,) = group["params"]
            numbers = range(len(by_weight), len(by_weight) + len(shapes))
            starts = _starts(shapes)
            for number, shape, start in zip(numbers, shapes, starts):
                by_weight[number] = {
                    name: value[start : start + shape.numel()].view(shape) if value.dim() else value.clone()
                    for name, value in state["state"].get(row, {}).items()
                    if value is not None
                }
            groups.append({**group, "params": list(numbers)})
        return {"state": {k: v for k, v in by_weight.items() if v}, "param_groups": groups}

    def _in_rows(self, optimizer, state: dict) -> dict:
        """The inverse of _by_weight; a weight that has no state yet gets zeros."""
        rows, groups = {}, []
        for k, (group, now, shapes) in enumerate(zip(state["param_groups"], optimizer.param_groups, self.shapes)):
            each = [state["state"].get(number, {}) for number in group["params"]]
            found = next((entries for entries in each if entries), {})
            rows[k] = {}
            for name, example in found.items():
                if example.dim() == 0:  # the number of steps
                    rows[k][name] = example.clone()
                    continue
                row = torch.zeros_like(now["params"][0], dtype=example.dtype, requires_grad=False)
                for entries, shape, start in zip(each, shapes, _starts(shapes)):
                    if name in entries:
                        row[start : start + shape.numel()] = entries[name].flatten()
                rows[k][name] = row
            groups.append({**group, "params": [k]})
        return {"state": {k: row for k, row in rows.items() if row}, "param_groups": groups}

    def whole(self):
        return contextlib.nullcontext()

    def close(self) -> None:
        """A second run in this process finds DeepSpeed as if it had never been used."""
        if self.engine is None:
            return
        from deepspeed.comm import comm

        self.engine.destroy()
        comm.destroy_process_group()
        comm.cdb = self.engine = None


class LossAlone(torch.nn.Module):
    """All that DeepSpeed sees of a network: its weights, and a loss that passes through."""

    def __init__(self, weights: list[torch.nn.Parameter]):
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


def _starts(shapes: list[torch.Size]) -> list[int]:
    """Where each weight begins in the row that holds all of them."""
    starts = [0]
    for shape in shapes[:-1]:
        starts.append(starts[-1] + shape.numel())
    return starts
