"""One optimizer step of six methods against TRL's trainer of each, and its peak memory: LoRA, three ratios of prompt to completion.

    python bench/align.py [--repetitions N] [--threads N] [--small] [--only NAME]

A step is forward, backward, clipping and AdamW at a rate of 0, so that all steps are alike. Ours is `Updates.step` of the training loop
with the method's objective, planning the rows and metrics inside the time; TRL's is `compute_loss` of its trainer on the batch that its
collator made before, and `backward`. Reference log-probabilities are part of the step on both sides: TRL turns its adapter off, ours
makes the table that training makes beforehand (of which a second epoch is free). What a loss needs is the same on both: beta 0 for
GRPO, and 0.01 for the centring of reward models. GRPO learns from samples that exist, by the policy that drew them.

Each method is measured in a process of its own, as a user trains: what one frees would change the times of the next, since new pages
cost more than kept ones. Peak memory is what a step adds to model and inputs, in a process per method and side, one length after
another, after a short step in which libraries set themselves up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from protocol import TOLERANCE, Bench, Case, Claim, Models, Text, interleave, models, options, peak_above  # isort: skip

import torch
from torch import Tensor

import twins
from fiducial.align.dpo import DPO
from fiducial.align.grpo import GRPO
from fiducial.align.kto import KTO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.core.roles import Objective
from fiducial.models.forest import Paths
from fiducial.models.local import LocalModel
from fiducial.models.planning import stats
from fiducial.models.scorehead import ScoreHead
from fiducial.models.scoring import Engine
from fiducial.training import lora, reference
from fiducial.training.data import Data
from fiducial.training.objective import GroupLogProbs, layout
from fiducial.training.options import TrainOptions
from fiducial.training.policy_gradient import SampledObjective
from fiducial.training.updates import Updates

SIDES = ("TRL", "ours")
HEAD = "score_head.weight"
UNCLIPPED = 1e9
"""Largest norm of the gradient: clipping is computed, but gradients are compared as they are."""
ALONE = "one completion per prompt: sharing cannot win, head and attention can"
UNSHARED = "nothing shared: at these lengths it would cost more than it saves"

PACKED = (
    "sft_packed is TRL's packing in one row. Its options say that only FlashAttention supports it, yet it runs on a CPU without: transformers reads the "
    "ends of documents from their position ids. No document sees another, as the difference from ours shows, where conversations are apart."
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Longest prompt and completion, in tokens."""

    name: str
    prompt: int
    completion: int


LENGTHS = (Lengths("4:1 (96:24)", 96, 24), Lengths("1:1 (48:48)", 48, 48), Lengths("1:4 (20:80)", 20, 80))
SMALL = (Lengths("4:1 (32:8)", 32, 8), Lengths("1:4 (8:32)", 8, 32))


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt and its completions, as token ids."""

    prompt: list[int]
    completions: list[list[int]]


@dataclass(frozen=True, slots=True)
class Method:
    """What a step is made of, ours and TRL's."""

    objective: Objective
    prompts: int
    k: int
    """Completions of each prompt."""
    kind: str
    """TRL's trainer, such as DPO."""
    example: Mapping[str, Any]
    """A row of data without which that trainer cannot be made."""
    collate: Callable[[Any, Sequence[Asked], Data], Mapping[str, Any]]
    """TRL's batch from its trainer and the step's data."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    rewards: Sequence[tuple[float, ...]] | None = None
    """Of each prompt's completions."""
    part: int = 1
    """Prompts and completions are this many times shorter than the lengths say."""
    least: float = 0.85
    """Shortest completion over the longest."""
    targets: tuple[float | None, ...] = (None, None, None)
    """Ratios to reach, in the order of LENGTHS."""
    note: str = ""


def _pairs(trainer: Any, asked: Sequence[Asked], _: Data) -> Mapping[str, Any]:
    return trainer.data_collator([{"prompt_ids": a.prompt, "chosen_ids": a.completions[0], "rejected_ids": a.completions[1]} for a in asked])


def _scored_pairs(trainer: Any, asked: Sequence[Asked], _: Data) -> Mapping[str, Any]:
    return trainer.data_collator([{"chosen_ids": a.prompt + a.completions[0], "rejected_ids": a.prompt + a.completions[1]} for a in asked])


def _unpaired(trainer: Any, asked: Sequence[Asked], data: Data) -> Mapping[str, Any]:
    """With the completion of the prompt before beside each, as TRL's preparation of data does it."""
    answers = [a.completions[0] for a in asked]
    labels = [bool(reward > 0) for reward in data.parts.rewards[:, 0]]
    rows = zip(asked, answers, [answers[-1], *answers[:-1]], labels, strict=True)
    return trainer.data_collator([{"prompt_ids": a.prompt, "completion_ids": own, "KL_completion_ids": other, "label": good} for a, own, other, good in rows])


def _samples(trainer: Any, asked: Sequence[Asked], data: Data) -> Mapping[str, Any]:
    (group,) = asked
    tokens = data.parts.tokens
    assert tokens is not None
    advantages = tokens.given["advantage"][tokens.position == 0]
    return twins.sampled(group.prompt, group.completions, pad=trainer.processing_class.pad_token_id) | {"advantages": advantages}


def _demonstrations(trainer: Any, asked: Sequence[Asked], _: Data) -> Mapping[str, Any]:
    return trainer.data_collator(_labelled(asked))


def _packed(trainer: Any, asked: Sequence[Asked], _: Data) -> Mapping[str, Any]:
    """All in one row, as TRL's own packing makes it."""
    from datasets import Dataset
    from trl import pack_dataset

    rows = _labelled(asked)
    (row,) = pack_dataset(Dataset.from_list(rows), sum(len(r["input_ids"]) for r in rows))
    return trainer.data_collator([row])


def _labelled(asked: Sequence[Asked]) -> list[dict[str, list[int]]]:
    return [{"input_ids": a.prompt + a.completions[0], "labels": [-100] * len(a.prompt) + a.completions[0]} for a in asked]


METHODS = {
    "dpo": Method(
        DPO(), 2, 2, "DPO", {"prompt": "a", "chosen": " b", "rejected": " c"}, _pairs, {"disable_dropout": True, "max_length": None}, targets=(2.2, 1.9, 1.5)
    ),
    "kto": Method(
        KTO(), 2, 1, "KTO", {"prompt": "a", "completion": " b", "label": True}, _unpaired,
        {"disable_dropout": True, "max_length": None, "per_device_train_batch_size": 2}, rewards=((1.0,), (-1.0,)), note=ALONE,
    ),
    "reward_model": Method(
        RewardModel(), 2, 2, "Reward", {"chosen_ids": [1, 2], "rejected_ids": [1, 3]}, _scored_pairs,
        {"disable_dropout": True, "max_length": None, "center_rewards_coefficient": RewardModel().centering},
    ),
    "grpo": Method(
        GRPO(beta=0.0), 1, 8, "GRPO", {"prompt": "a"}, _samples,
        {"disable_dropout": True, "beta": 0.0, "loss_type": "grpo", "num_generations": 8, "per_device_train_batch_size": 8, "max_completion_length": 256},
        {"reward_funcs": twins.no_reward}, rewards=((1.0, 0.0, 0.5, 0.0, 1.0, 0.25, 0.75, 0.0),), least=0.55, targets=(4.5, 2.7, 1.6),
    ),
    "sft": Method(SFT(), 2, 1, "SFT", {"input_ids": [1, 2], "labels": [1, 2]}, _demonstrations, {"max_length": 1024}, note=ALONE),
    "sft_packed": Method(
        SFT(), 4, 1, "SFT", {"input_ids": [1, 2], "labels": [1, 2]}, _packed, {"max_length": 1024, "packing": True}, part=2, note=ALONE
    ),
}  # fmt: skip


def draw(method: Method, text: Text, lengths: Lengths) -> list[Asked]:
    """The step's prompts and completions."""
    longest = lengths.completion // method.part
    least = int(method.least * longest)
    return [Asked(text.take(lengths.prompt // method.part), [text.take(least, longest) for _ in range(method.k)]) for _ in range(method.prompts)]


def data_of(method: Method, asked: Sequence[Asked]) -> Data:
    """The same as our training has it, with what the samples teach where the objective learns from samples."""
    completions, objective = (Completion(text="-"),) * method.k, method.objective
    rewards = method.rewards or [None] * len(asked)
    groups = [Group(prompt=Prompt(messages=user("-")), completions=completions, rewards=known) for known in rewards]
    sizes = [[len(c) for c in a.completions] for a in asked]
    rows = [(a.prompt + c, len(a.prompt) + len(c) * ("scores" in objective.reads)) for a in asked for c in a.completions]
    paths = Paths.of(rows, group=[g for g in range(len(asked)) for _ in range(method.k)])
    parts = layout(groups, sizes, {} if "tokens" in objective.reads else None)
    if isinstance(objective, SampledObjective):
        parts = layout(groups, sizes, objective.lessons(parts, parts, room=max(map(max, sizes))).given)
    return Data(groups, [str(g) for g in range(len(groups))], paths, [g * method.k for g in range(len(groups))], parts)


@dataclass(frozen=True, slots=True)
class Side:
    """One policy in training."""

    module: Any
    named: Mapping[str, Tensor]
    """What trains, by our names."""
    optimizer: torch.optim.Optimizer
    ready: Callable[[Sequence[Asked]], Callable[[], float]]
    """The step on some data, which gives its loss."""


def ours_of(method: Method, policy: Any, head: ScoreHead | None, tokenizer: Any) -> Side:
    """Our side."""
    from accelerate import Accelerator

    model = LocalModel(policy, tokenizer, uri="bench")
    model.head = head
    updates = Updates(model, method.objective, TrainOptions(clip=UNCLIPPED), Accelerator(cpu=True))

    def ready(asked: Sequence[Asked]) -> Callable[[], float]:
        data = data_of(method, asked)
        chosen = range(len(data.groups))

        def run() -> float:
            table, pairs = referred(model, data, method.objective)
            return updates.step(data, chosen, rate=0.0, reference=table, mismatched=pairs)["loss"]

        return run

    return Side(policy, updates.trainables.masters, updates.optimizer, ready)


def referred(model: LocalModel, data: Data, objective: Objective) -> tuple[GroupLogProbs | None, Tensor | None]:
    """The data under the reference and, where they are read, its mismatched pairs, as training makes them before its first step."""
    if not objective.needs_reference or isinstance(objective, SampledObjective):
        return None, None
    chosen = range(len(data.groups))
    with lora.adapter_off(model.module):
        table = reference.logprobs(model.engine, data.paths, fingerprint="")
        pairs = reference.logprobs(model.engine, data.mismatched(chosen), fingerprint="") if "mismatched" in objective.reads else None
    return data.parts.with_logp(data.place(chosen, table)), pairs


@contextmanager
def theirs_of(method: Method, base: Any, policy: Any, head: ScoreHead | None, tokenizer: Any) -> Iterator[Side]:
    """TRL's side, around the weights of `base` with the adapter of `policy` and the weights of `head`."""
    module = twins.full_policy(base) if head is None else twins.classifier(base, head.weight)
    more = {"peft_config": twins.peft_config(task="CAUSAL_LM" if head is None else "SEQ_CLS"), **method.more}
    with twins.trainer(method.kind, module, policy, tokenizer, method.example, more=more, **method.settings) as trainer:
        named = {HEAD if ".score." in name else name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(named.values(), lr=0.0, weight_decay=0.0, fused=True)

        def ready(asked: Sequence[Asked]) -> Callable[[], float]:
            batch = method.collate(trainer, asked, data_of(method, asked))

            def run() -> float:
                loss = twins.peer_step(trainer, batch)
                torch.nn.utils.clip_grad_norm_(named.values(), UNCLIPPED)
                optimizer.step()
                optimizer.zero_grad()
                return loss

            return run

        yield Side(trainer.model, named, optimizer, ready)


@contextmanager
def sides_of(method: Method, base: Any, tokenizer: Any, *, names: Sequence[str] = SIDES) -> Iterator[dict[str, Side]]:
    """The sides by name, over the same weights."""
    policy, head = twins.lora_policy(base), None
    if "scores" in method.objective.reads:
        head = ScoreHead.fresh(base.config.hidden_size, seed=0, higher_is="better", trained_by=method.objective.name)
        with torch.no_grad():  # TRL's head is of the model's type
            head.weight.copy_(head.weight.to(base.dtype))
    with ExitStack() as stack:
        found = {}
        # TRL's options reset accelerate's state, so its trainer comes first
        if "TRL" in names:
            found["TRL"] = stack.enter_context(theirs_of(method, base, policy, head, tokenizer))
        if "ours" in names:
            found["ours"] = ours_of(method, policy, head, tokenizer)
        yield found


def outcome(side: Side, run: Callable[[], float]) -> tuple[float, dict[str, Tensor]]:
    """Loss of a step, and the gradient that its optimizer was given."""
    gradient: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        gradient.update({name: p.grad.detach().float().flatten().clone() for name, p in side.named.items() if p.grad is not None})

    hook = side.optimizer.register_step_pre_hook(keep)
    loss = run()
    hook.remove()
    return loss, gradient


@dataclass(frozen=True, slots=True)
class Known:
    """What the float32 run says of a step."""

    difference: float
    gradient: Mapping[str, Tensor]
    """TRL's."""
    counts: Mapping[str, int | str]


def exact(method: Method, sides: Mapping[str, Side], asked: Sequence[Asked]) -> Known:
    """Losses and gradients of both sides compared, and token counts."""
    loss, gradient = outcome(sides["TRL"], sides["TRL"].ready(asked))
    own, found = outcome(sides["ours"], sides["ours"].ready(asked))
    off, apart = abs(own - loss), twins.apart(found, gradient)
    paths = data_of(method, asked).paths
    tokens = stats(paths, Engine(sides["ours"].module).plan(paths, grad=True, keep_last="scores" in method.objective.reads))
    counts = {"prompts": method.prompts, "completions of each": method.k, "naive tokens": tokens.naive, "unique tokens": tokens.unique}
    return Known(max(off, apart), gradient, counts | {"loss difference": f"{off:.1e}", "gradient difference": f"{apart:.1e}"})


def measure(bench: Bench, loaded: Models, name: str) -> None:
    """A method at all lengths: float32 for exactness, then bfloat16 timed."""
    method = METHODS[name]
    text, lengths = Text(loaded.tokenizer), SMALL if bench.small else LENGTHS
    asked = {at: draw(method, text, at) for at in lengths}
    known: dict[Lengths, Known] = {}
    with sides_of(method, loaded.modules["float32"], loaded.tokenizer) as sides:
        for at in lengths:
            known[at] = exact(method, sides, asked[at])
            if bench.small:
                bench.add(case(name, at, "float32", known[at], {}, {}))
    if bench.small:
        return
    with sides_of(method, loaded.modules["bfloat16"], loaded.tokenizer) as sides:
        for at in lengths:
            run = {side: sides[side].ready(asked[at]) for side in sides}
            errors = {side: twins.apart(outcome(sides[side], run[side])[1], known[at].gradient) for side in sides}
            times, _ = interleave(run, bench.repetitions, warm=False)
            bench.add(case(name, at, "bfloat16", known[at], times, errors))


def case(name: str, at: Lengths, dtype: str, known: Known, times: Any, errors: dict[str, float]) -> Case:
    """The record of a method at one length."""
    method = METHODS[name]
    claims = [Claim("ours", "TRL", dict(zip(LENGTHS, method.targets, strict=True)).get(at))]
    of = "loss; gradient, relative L2"
    note = method.note or UNSHARED * (known.counts["unique tokens"] == known.counts["naive tokens"])
    return Case(f"{name}, {at.name}", dtype, claims, times, known.difference, TOLERANCE, of, errors, known.counts, note)


def memory(bench: Bench, names: Sequence[str]) -> None:
    """Peaks of both sides at all lengths."""
    rows = []
    for name in names:
        peaks = {side: _peaks(name, side, bench.options.threads) for side in SIDES}
        for at in LENGTHS:
            trl, own = (peaks[side][at.name] for side in SIDES)
            rows.append({"case": f"{name}, {at.name}", "TRL": trl, "ours": own, "ours of TRL's": f"{own / trl:.2f}"})
    bench.tables["Peak memory of a step above model and inputs, MiB, bfloat16"] = rows


def _peaks(name: str, side: str, threads: int) -> dict[str, int]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", side, "--only", name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str, side: str, threads: int) -> None:
    """Prints what a step of one side adds to the resident memory, by length, in MiB."""
    torch.set_num_threads(threads)
    loaded, method = models(small=False, dtypes=("bfloat16",)), METHODS[name]
    text = Text(loaded.tokenizer)
    with sides_of(method, loaded.modules["bfloat16"], loaded.tokenizer, names=[side]) as sides:
        ready = sides[side].ready
        ready(draw(method, text, SMALL[0]))()
        print(json.dumps({at.name: round(peak_above(ready(draw(method, text, at)))) for at in LENGTHS}))


def alone(name: str, chosen: argparse.Namespace) -> Mapping[str, Any]:
    """The record of a method from a process of its own."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--only", name, "--out", folder, *["--keep-memory"] * chosen.keep_memory]
        # an exit code of 1 may be that of a record that is not valid, and says so
        done = subprocess.run([*command, "--threads", str(chosen.threads), "--repetitions", str(chosen.repetitions)], check=False)
        record = Path(folder) / "align.json"
        if not record.exists():
            sys.exit(f"measuring {name} ended with {done.returncode} and left no record")
        return json.loads(record.read_text(encoding="utf-8"))


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=tuple(METHODS), action="append", help="this method alone; may be repeated; written with --out alone")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 0 if losses and gradients agree."""
    chosen = options(__doc__, argv, more=_more)
    names = chosen.only or list(METHODS)
    if chosen.child:
        child(names[0], chosen.child, chosen.threads)
        return 0
    with Bench("align", chosen, partial=bool(chosen.only)) as bench:
        if bench.small or len(names) == 1:
            loaded = models(small=bench.small)
            for name in names:
                measure(bench, loaded, name)
            if not bench.small:
                del loaded
                memory(bench, names)
        else:
            for name in names:
                bench.take(alone(name, chosen))
        bench.notes.append("faster and slower: all repetitions agree, in wall and in CPU seconds; otherwise the ranges do not tell the sides apart.")
        bench.notes.append(PACKED)
        bench.notes.append("Errors are relative L2 errors of the whole gradient against TRL's in float32 with the same weights.")
        return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
