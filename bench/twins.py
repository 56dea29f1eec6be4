"""The same policy twice over the same weights: one for our engine, one for TRL, whose trainers patch the model they are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from protocol import quiet  # isort: skip

import torch
from torch import Tensor

from fiducial.models import adapters
from fiducial.training import lora

RANK = 16
SPREAD = 0.02
"""Standard deviation of the second adapter matrix, which would start at zero and make policy and reference equal."""


def lora_policy(base: Any, *, seed: int = 0) -> Any:
    """`base` with a random adapter of rank 16 on all linear layers; its weights are shared."""
    policy = lora.attach(base, rank=RANK, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=draw) * SPREAD)
    return policy


def peft_config(*, task: str = "CAUSAL_LM") -> Any:
    """The configuration with which TRL puts on the same kind of adapter."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type=task)


def same_adapter(policy: Any, theirs: Any) -> None:
    """Copies our adapter into TRL's."""
    held = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_" in name:
                held[name].copy_(p)


def full_policy(base: Any) -> Any:
    """A model over the weights of `base` of which all train."""
    policy = adapters.sharing(base)
    lora.make_trainable(policy)
    return policy


def classifier(base: Any, head: Tensor) -> Any:
    """A model of one score per sequence over the weights of `base`, with `head`, [D]: what TRL trains as a reward model."""
    from transformers import AutoModelForSequenceClassification

    causal = full_policy(base)
    causal.config.num_labels = 1
    with torch.device("meta"):
        module = AutoModelForSequenceClassification.from_config(causal.config)
    module.config = causal.config  # one object for both, by which attention is chosen
    setattr(module, module.base_model_prefix, causal.base_model)
    module.score = torch.nn.Linear(len(head), 1, bias=False, dtype=base.dtype)
    with torch.no_grad():
        module.score.weight.copy_(head[None])
    return module


@contextmanager
def trainer(kind: str, model: Any, policy: Any, tokenizer: Any, example: Mapping[str, Any], *, more: Mapping[str, Any], **settings: Any) -> Iterator[Any]:
    """TRL's trainer of that kind ("DPO") around `model`, with the adapter of `policy`, its one row of data being `example`.

    `settings` are those of its configuration, `more` goes to the trainer itself. Without gradient checkpointing; attention by products.
    """
    import trl
    from datasets import Dataset

    with TemporaryDirectory() as folder, quiet():
        args = getattr(trl, f"{kind}Config")(output_dir=folder, use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False, **settings)
        data = Dataset.from_list([dict(example)])
        made = getattr(trl, f"{kind}Trainer")(model=model, args=args, train_dataset=data, processing_class=tokenizer, **more)
        same_adapter(policy, made.model)
        attending_by_products(made.model).train()
        made.current_gradient_accumulation_steps = 1  # otherwise set by its `train`
        yield made


def peer_step(trainer: Any, batch: Mapping[str, Any]) -> float:
    """The loss of TRL's trainer on a batch as it collates it; gradients are left in its model."""

    def run() -> float:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return float(loss.detach())

    with quiet():
        return step(trainer.model, run)


def sampled(prompt: Sequence[int], completions: Sequence[Sequence[int]], *, pad: int) -> dict[str, Tensor]:
    """A group as TRL's GRPOTrainer has it after sampling: completions right-padded."""
    width = max(map(len, completions))
    ids, mask = torch.full((len(completions), width), pad), torch.zeros(len(completions), width, dtype=torch.long)
    for row, completion in enumerate(completions):
        ids[row, : len(completion)], mask[row, : len(completion)] = torch.tensor(completion), 1
    prompts = torch.tensor(prompt).expand(len(completions), -1)
    return {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": ids, "completion_mask": mask}


def no_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """The reward function without which GRPOTrainer cannot be made."""
    return [0.0] * len(completions)


def attending_by_products(module: Any) -> Any:
    """The peer's model with eager attention: on a CPU it is faster than torch's fused kernel, and of the kind that ours uses there."""
    causal = module.get_base_model() if hasattr(module, "get_base_model") else module
    causal.set_attn_implementation("eager")
    return module


def moved(base: Any, *, seed: int = 0) -> Any:
    """A copy of `base` with one per cent of noise on its matrices: a reference that is not the policy."""
    reference = copy.deepcopy(base).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in reference.parameters():
            if p.ndim > 1:
                p.add_((torch.randn(p.shape, generator=draw) * 0.01 * float(p.float().std())).to(p.dtype))
    return reference


def step(module: Any, loss_and_backward: Callable[[], float]) -> float:
    """The loss of one step from empty gradients, which are left in the module."""
    module.zero_grad(set_to_none=True)
    return loss_and_backward()


def gradients(module: Any) -> dict[str, Tensor]:
    """Gradients by parameter name, in float32."""
    return {name: p.grad.detach().float().clone() for name, p in module.named_parameters() if p.grad is not None}


def apart(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Length of the difference of two gradients over the length of the second; infinite if they are of different parameters."""
    if set(ours) != set(truth):
        return float("inf")
    off = sum(float((ours[name] - g).double().square().sum()) for name, g in truth.items())
    return (off / sum(float(g.double().square().sum()) for g in truth.values())) ** 0.5
