"""The optimizer's step inside the backward pass, one weight after another, so that gradients never exist together.

A weight's gradient is used and freed the moment it is complete. What all gradients together decide (their norm, before
it clips; whether they are numbers, before a step is taken) is therefore known too late to change the step.
"""

import torch

from utils.randomness import seed_of


class FusedBackward:
    """Steps `optimizer` from within `loss.backward()`; everything else goes on as if it had been stepped afterwards.

    Weights in bf16 are raised for their step and rounded by chance, so that updates smaller than their last digit are
    not lost but taken now and then.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int = 0):
        self.optimizer, self.seed = optimizer, seed
        self.number, self.stepping, self.norms = 0, True, []
        groups = enumerate(optimizer.param_groups)
        owners = [(number, weight) for number, group in groups for weight in group["params"]]
        for place, (number, weight) in enumerate(owners):
            weight.register_post_accumulate_grad_hook(self._hook(number, place))
        if any(weight.dtype != torch.float32 for _, weight in owners):
            _keep_precision(optimizer)

    def begin(self, number: int, loss: torch.Tensor, unusable: bool = False) -> None:
        """Before the backward pass of optimizer step `number`: a loss that is no number moves nothing, nor does one of
        pictures that the run ends for."""
        self.number, self.stepping, self.norms = number, not unusable and bool(torch.isfinite(loss.detach())), []

    def norm(self) -> torch.Tensor:
        """Of all gradients of the backward pass together, as guard.gradient_norm measures it."""
        if not self.norms:
            raise RuntimeError("no parameter received a gradient: the loss does not depend on what should learn")
        return torch.linalg.vector_norm(torch.stack([norm.to(self.norms[0].device) for norm in self.norms]))

    def _hook(self, group: int, place: int):
        @torch.no_grad()
        def step(weight: torch.Tensor) -> None:
            self.norms.append(torch.linalg.vector_norm(weight.grad, dtype=torch.float32))
            if self.stepping:
                self._step(group, weight, seed_of(self.seed, "rounding", self.number, place))
            weight.grad = None

        return step

    def _step(self, number: int, weight: torch.Tensor, seed: int) -> None:
        every = self.optimizer.param_groups
        group = every[number]  # by number: reading a checkpoint makes new ones
        all_of_it = group["params"]
        kept, gradient = weight.data, weight.grad
        self.optimizer.param_groups, group["params"] = [group], [weight]
        try:
            if kept.dtype == torch.float32:
                self.optimizer.step()
                return
            weight.grad, weight.data = None, kept.float()
            weight.grad = gradient.float()
            self.optimizer.step()
            raised = weight.data
            weight.grad, weight.data = None, kept
            kept.copy_(rounded_by_chance(raised, seed))
        finally:
            self.optimizer.param_groups, group["params"] = every, all_of_it


def rounded_by_chance(values: torch.Tensor, seed: int) -> torch.Tensor:
    """fp32 => bf16, up or down with the probabilities that make the mean exact; what bf16 can hold stays.

    Gupta et al. 2015 (arXiv 1502.02551), section 3.1. bf16 is the upper half of fp32: whatever is added to the lower
    half carries over as often as that half is large.
    """
    generator = torch.Generator(values.device).manual_seed(seed)
    chance = torch.randint(0, 2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    carried = (values.contiguous().view(torch.int32) + chance) & -(2**16)
    # Infinities and what is no number stay what they are.
    return torch.where(values.isfinite(), carried.view(torch.float32), values).to(torch.bfloat16)


def _keep_precision(optimizer: torch.optim.Optimizer) -> None:
    """torch reads an optimizer's state back in the precision of the weights; here it is finer than they are."""
    read = {}

    def before(_, state: dict) -> None:
        read.update(state["state"])

    def after(optimizer: torch.optim.Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for place, state in read.items():
            for name, value in state.items():
                if torch.is_tensor(value) and name != "step":
                    optimizer.state[weights[place]][name] = value.to(weights[place].device)
        read.clear()

    if hasattr(optimizer, "register_load_state_dict_pre_hook"):
        optimizer.register_load_state_dict_pre_hook(before)
        optimizer.register_load_state_dict_post_hook(after)
