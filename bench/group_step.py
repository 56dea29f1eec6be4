"""One policy step on a group of eight completions against TRL's GRPOTrainer: `compute_loss` and `backward`, beta 0, LoRA.

    python bench/group_step.py [--repetitions N] [--threads N] [--small]

TRL takes its own padded tensors and computes the entropy, a metric, on every call; "tree, entropy too" computes it as well, at the first length. Ours is
the engine's rows with the same clipped loss, written below. Old log-probabilities are given to both sides, so that ratios differ from
1 and some are clipped. Gradient checkpointing is off, dropout 0, the optimizer outside. Peak memory is measured in a process of its
own per side, as what one step adds to model and inputs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import TOLERANCE, Bench, Case, Claim, Models, Text, interleave, models, options, peak_above  # isort: skip

import torch
from torch import Tensor

import twins
from fiducial.models.forest import Paths
from fiducial.models.planning import stats
from fiducial.models.scoring import Engine
from fiducial.training import lora

K = 8
CLIP = 0.2
WITH_ENTROPY = "tree, entropy too"
MEMORY_TARGET = 0.5


@dataclass(frozen=True, slots=True)
class Setting:
    """Length of the prompt, longest completion, and the ratio to reach."""

    name: str
    prompt: int
    completion: int
    target: float | None


SETTINGS = (Setting("4:1 (128:32)", 128, 32, 4.5), Setting("1:1 (48:48)", 48, 48, 2.7), Setting("1:4 (20:80)", 20, 80, 1.6))
SMALL = (Setting("4:1 (32:8)", 32, 8, None), Setting("1:4 (8:32)", 8, 32, None))


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its completions, their advantages [K] and the old log-probabilities of their tokens."""

    prompt: list[int]
    completions: list[list[int]]
    advantages: Tensor
    old: list[Tensor]

    @property
    def paths(self) -> Paths:
        """All completions, in one group."""
        return Paths.of([(self.prompt + c, len(self.prompt)) for c in self.completions], group=[0] * len(self.completions))

    def tensors(self, pad: int) -> dict[str, Tensor]:
        """As TRL's trainer has it after sampling."""
        tensors = twins.sampled(self.prompt, self.completions, pad=pad)
        old = torch.nn.utils.rnn.pad_sequence(self.old, batch_first=True)
        return tensors | {"advantages": self.advantages, "old_per_token_logps": old}


def group(module: Any, text: Text, setting: Setting) -> Group:
    """A group whose completions have 55 to 100 per cent of the longest length; old log-probabilities are those without adapter."""
    prompt = text.take(setting.prompt)
    completions = [text.take(int(0.55 * setting.completion), setting.completion) for _ in range(K)]
    rewards = torch.randn(K, generator=torch.Generator().manual_seed(0))
    bare = Group(prompt, completions, (rewards - rewards.mean()) / rewards.std(), [])
    with lora.adapter_off(module):
        scores = Engine(module, backend="padded").score(bare.paths)
    old = list(scores.edge_logp.split(scores.path_len.tolist()))
    return Group(prompt, completions, bare.advantages, old)


@contextmanager
def trainer_of(base: Any, tokenizer: Any, policy: Any) -> Iterator[Any]:
    """TRL's trainer around the weights of `base` with the adapter of `policy`."""
    settings: dict[str, Any] = {"beta": 0.0, "epsilon": CLIP, "loss_type": "grpo", "disable_dropout": True}
    settings |= {"num_generations": K, "per_device_train_batch_size": K, "max_completion_length": 256}
    more = {"reward_funcs": twins.no_reward, "peft_config": twins.peft_config()}
    with twins.trainer("GRPO", twins.full_policy(base), policy, tokenizer, {"prompt": "a"}, more=more, **settings) as trainer:
        yield trainer


def ours(engine: Engine, asked: Group, *, entropy: bool = False) -> float:
    """Our loss; gradients are left in the engine's module.

    Per completion the mean over its tokens of -min(r A, clip(r, 0.8, 1.2) A), r = exp(logp - old); then the mean over completions.
    """

    def run() -> float:
        total = 0.0
        for indices, scores in engine.stream(asked.paths, grad=True, entropy=entropy):
            old = torch.cat([asked.old[i] for i in indices])
            advantage = asked.advantages[indices][scores.edge_path]
            ratio = torch.exp(scores.edge_logp - old)
            token_loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            loss = (token_loss / scores.path_len[scores.edge_path]).sum() / K
            loss.backward()
            total += float(loss.detach())
        return total

    return twins.step(engine.module, run)


def sides_of(policy: Any, trainer: Any, asked: Group) -> dict[str, Callable[[], float]]:
    """What is timed, by name."""
    inputs, engine = asked.tensors(trainer.processing_class.pad_token_id), Engine(policy)
    return {"TRL": lambda: twins.peer_step(trainer, inputs), "tree": lambda: ours(engine, asked), WITH_ENTROPY: lambda: ours(engine, asked, entropy=True)}


def outcome(policy: Any, trainer: Any, run: dict[str, Callable[[], float]], side: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one side."""
    loss = run[side]()
    return loss, twins.gradients(trainer.model if side == "TRL" else policy)


def measure(bench: Bench, loaded: Models) -> None:
    """All lengths: float32 for exactness, then bfloat16 timed."""
    settings, known = SMALL if bench.small else SETTINGS, {}
    base = loaded.modules["float32"]
    policy = twins.lora_policy(base)
    asked = {setting.name: group(policy, Text(loaded.tokenizer), setting) for setting in settings}
    with trainer_of(base, loaded.tokenizer, policy) as trainer:
        for setting in settings:
            run = sides_of(policy, trainer, asked[setting.name])
            loss, gradient = outcome(policy, trainer, run, "TRL")
            found = [outcome(policy, trainer, run, side) for side in run if side != "TRL"]
            off = max(max(abs(ours - loss), twins.apart(g, gradient)) for ours, g in found)
            known[setting.name] = (off, gradient)
            if bench.small:
                bench.add(case(setting, "float32", asked[setting.name], policy, off, {}, {}))
    if bench.small:
        return
    base = loaded.modules["bfloat16"]
    policy = twins.lora_policy(base)
    with trainer_of(base, loaded.tokenizer, policy) as trainer:
        for setting in settings:
            run = sides_of(policy, trainer, asked[setting.name])
            off, gradient = known[setting.name]
            errors = {side: twins.apart(outcome(policy, trainer, run, side)[1], gradient) for side in run}
            if setting is not settings[0]:
                del run[WITH_ENTROPY]
            times, _ = interleave(run, bench.repetitions, warm=False)
            bench.add(case(setting, "bfloat16", asked[setting.name], policy, off, times, errors))


def case(setting: Setting, dtype: str, asked: Group, policy: Any, off: float, times: Any, errors: dict[str, float]) -> Case:
    """The record of one length."""
    tokens = stats(asked.paths, Engine(policy).plan(asked.paths, grad=True))
    counts = {"K": K, "padded tokens": tokens.padded + K, "unique tokens": tokens.unique, "scored tokens": tokens.scored}
    claims = [Claim("tree", "TRL", setting.target)] + [Claim(WITH_ENTROPY, "TRL")] * (WITH_ENTROPY in times)
    return Case(setting.name, dtype, claims, times, off, TOLERANCE, "loss; gradient, relative L2", errors, counts)


def memory(bench: Bench) -> None:
    """Peak of the first case's step on each side, each in a process of its own."""
    rows = []
    for side in ("TRL", "tree"):
        command = [sys.executable, str(Path(__file__).resolve()), "--child", side, "--threads", str(bench.options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"side": side} | json.loads(done.stdout.splitlines()[-1]))
    share = rows[1]["MiB above model and inputs"] / rows[0]["MiB above model and inputs"]
    rows[0]["of TRL"], rows[1]["of TRL"] = "1.00", f"{share:.2f} (target <= {MEMORY_TARGET}: {'reached' if share <= MEMORY_TARGET else 'missed'})"
    bench.tables[f"Peak memory of one step, {SETTINGS[0].name}, bfloat16"] = rows


def child(side: str, threads: int) -> None:
    """Prints what one step of one side adds to the resident memory."""
    torch.set_num_threads(threads)
    loaded = models(small=False, dtypes=("bfloat16",))
    base = loaded.modules["bfloat16"]
    policy = twins.lora_policy(base)
    asked = group(policy, Text(loaded.tokenizer), SETTINGS[0])
    if side == "tree":
        peak = peak_above(lambda: ours(Engine(policy), asked))
    else:
        with trainer_of(base, loaded.tokenizer, policy) as trainer:
            inputs = asked.tensors(loaded.tokenizer.pad_token_id)
            peak = peak_above(lambda: twins.peer_step(trainer, inputs))
    print(json.dumps({"MiB above model and inputs": round(peak)}))


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--child", choices=("TRL", "tree"), help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 0 if losses and gradients agree."""
    chosen = options(__doc__, argv, more=_more)
    if chosen.child:
        child(chosen.child, chosen.threads)
        return 0
    with Bench("group_step", chosen) as bench:
        measure(bench, models(small=bench.small))
        if not bench.small:
            memory(bench)
        bench.notes.append("Errors are relative L2 errors of the whole gradient against TRL's in float32 with the same weights.")
        return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
