"""Trains tiny models and writes what came of each; to be run by several processes at once, or in children that are killed.

python trainers.py OUT FOLDER TRAINER...

A trainer is an objective's name, as in dpo, with what is special about it: sft@full trains all weights, sft@full@bfloat16 weights of that type,
sft@top an adapter on the upper block alone, sft@noise has noise on embeddings, dpo@rows cuts groups into several rows, dpo@stopped stops after a
step, dpo@again goes on after that, dpo@killed kills itself in the third step if there is no checkpoint, dpo@threads divides steps between two
threads, dpo@online learns from its own samples, rloo@cost and ppo@cost have a cost to keep below a limit, the second with a critic of it, ppo@shown
has demonstrations mixed in.
The first of several processes writes OUT, the others OUT.1, OUT.2, ...
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fiducial.core import registry
from fiducial.core.errors import ConfigError
from fiducial.core.records import Completion, Group, Prompt, digest, user
from fiducial.core.roles import Reward
from fiducial.models import abreast
from fiducial.models.local import LocalModel
from fiducial.models.scoring import Engine
from fiducial.models.scripted import tiny
from fiducial.training import updates
from fiducial.training.loop import train
from fiducial.training.online import learn
from fiducial.training.online_options import OnlineOptions
from fiducial.training.online_task import Task
from fiducial.training.options import TrainOptions
from fiducial.training.rewards import Mixture, Part

PROMPTS = [Prompt(messages=user(text)) for text in ("hello", "why?", "tell me")]
ONLINE = OnlineOptions(k=3, max_tokens=5, kl_budget=1e9, length_change=None)
OPTIONS = TrainOptions(batch=3, epochs=2, learning_rate=1e-3, lora_rank=4, save_every=2)


class Letters(Reward):
    """How many letters an answer has."""

    @property
    def name(self):
        return "test/letters"

    def options(self):
        return {}

    def score(self, groups):
        return [tuple(float(sum(c.isalpha() for c in each.text)) for each in g.completions) for g in groups]


def budgeted(budget, seed=0, backend="tree"):
    """A tiny model whose rows hold about `budget` tokens; with the back end "split" every group fills at least two."""
    base = tiny(seed=seed)

    class Budgeted(LocalModel):
        @property
        def engine(self):
            if self._engine is None or self._engine.module is not self.module:
                self._engine = Engine(self.module, backend=backend, budget=budget)
                self._engine._part = replace(self._engine._part, crossover=1e9)  # the budget alone decides about rows
            return self._engine

    return Budgeted(base.module, base.tokenizer, uri="tiny")


def groups():
    """7 pairs of unequal lengths and weights, with everything that any objective learns from: rewards, soft labels, values of parts."""
    texts = [("no" + "o" * 3 * n, "yes, " + "e" * (n + 1)) for n in range(7)]
    return [
        Group(
            prompt=Prompt(messages=user(f"question {n}")),
            completions=tuple(Completion(text=t, ends=(1, len(t)), values=(1.0, float(k))) for k, t in enumerate(pair)),
            targets=(0.9, 0.1),
            rewards=(0.5, -1.0),
            weight=1.0 + n % 2,
        )
        for n, pair in enumerate(texts)
    ]


def die_in(step):
    """Kills this process as soon as the optimizer has moved weights so many times."""
    left = iter(range(step - 1))
    register_optimizer_step_post_hook(lambda *_: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL))


@contextmanager
def two_threads() -> Iterator[None]:
    """Every step of more than one group is divided between two threads."""
    before = torch.get_num_threads(), abreast.TOKENS_EACH
    torch.set_num_threads(2)
    abreast.TOKENS_EACH = 1
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        abreast.TOKENS_EACH = before[1]


def go(trainer, folder, *, report=None, again=False):
    """The trained model, and what came of it; 5 steps with a checkpoint after the 2nd, the 4th and the last."""
    name, *special = trainer.split("@")
    if "threads" in special:
        with two_threads():
            return go(trainer.replace("@threads", ""), folder, report=report, again=again)
    if "killed" in special and not list(folder.glob("checkpoint-*")):
        die_in(3)
    card = registry.card(f"align/{name}")
    sampled = bool(card.constants.get("on_policy"))
    objective = registry.create(card.name, {"beta": 0.5} if sampled or name in ("dpo", "kto") else {"mean": "token"} if name == "orpo" else {})
    stops = not again and not {"again", "stopped"}.isdisjoint(special)
    carried = {"lora_rank": 0 if "full" in special else 4, "lora_depth": 0.5 if "top" in special else 1.0}
    carried |= {"neftune": 5.0 if "noise" in special else 0.0}
    options = OPTIONS.model_copy(update=carried | {"minutes": 1e-9 if stops else None})
    model = budgeted(30, backend="split") if "rows" in special else tiny()
    if "bfloat16" in special:
        model.module = model.module.bfloat16()
    if sampled or "online" in special:
        asked = options.model_copy(update={"epochs": 3, "batch": 2})  # the last step has one prompt
        shown = groups()[:4] if "shown" in special else ()
        task = Task(PROMPTS, Mixture.of([Part(Letters())]), Letters() if "cost" in special else None, demonstrations=shown)
        online = ONLINE.model_copy(update={"kl_target": 0.5 if sampled else None})
        result = learn(model, task, objective, asked, online, folder=folder, report=report)
    else:
        result = train(model, groups(), objective, options, folder=folder, report=report)
    if "again" in special and not again:
        assert result.steps == 1
        return go(trainer, folder, report=report, again=True)
    return model, result


def found(model, result):
    """What must not depend on interruptions or on the number of processes."""
    model.changed()
    weights = {n: p.detach().float().flatten().tolist() for n, p in model.module.named_parameters() if p.requires_grad}
    if model.head:
        weights["head"] = model.head.weight.tolist()
    if model.cost_head:
        weights["cost_head"] = model.cost_head.weight.tolist()
    return {"fingerprint": model.fingerprint, "history": result.history, "tokens": result.naive_tokens, "weights": weights, "stop": result.stop}


def lived(trainer, folder):
    """What came of a trainer, its weights as a hash, and the steps that this process made; to be called again in a process that goes on."""
    steps = []
    result = found(*go(trainer, Path(folder), report=lambda step, *_: steps.append(step)))
    return result | {"weights": digest(result["weights"])}, steps


def warm():
    """Makes a process do once what is slow the first time."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        go("ppo", Path(folder))


@contextmanager
def watched() -> Iterator[dict[str, list[int]]]:
    """Of every parameter in training that processes share out, how many values are here and how many there are."""
    init, seen = updates.Trainables.__init__, {}

    def noted(self, *args):
        init(self, *args)
        seen.clear()
        seen.update({name: [self.masters[name].numel(), self.named[name].numel()] for name in self.shared_out})

    updates.Trainables.__init__ = noted
    try:
        yield seen
    finally:
        updates.Trainables.__init__ = init


def main(out, folder, *trainers):
    results = {}
    for trainer in trainers:
        try:
            steps = []
            with watched() as shared_out:
                results[trainer] = found(*go(trainer, Path(folder) / trainer, report=lambda step, *_, steps=steps: steps.append(step)))
            results[trainer] |= {"shared_out": shared_out} | ({"made": steps} if "@killed" in trainer else {})
        except ConfigError as error:
            results[trainer] = {"refused": error.message}
    rank = int(os.environ.get("RANK", "0"))
    Path(f"{out}.{rank}" if rank else out).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
