"""Learns from its own samples: killed while the third checkpoint is being written, as by a machine that goes off, or one of several processes.

python killed_online.py FOLDER [OUT]
"""

import json
import os
import signal
import sys
from pathlib import Path

import safetensors.torch

from fiducial.align.rloo import RLOO
from fiducial.core.records import Prompt, user
from fiducial.core.roles import Reward
from fiducial.models.scripted import tiny
from fiducial.training.online import Task, learn
from fiducial.training.online_options import OnlineOptions
from fiducial.training.options import TrainOptions
from fiducial.training.rewards import Mixture, Part


class Letters(Reward):
    """How many letters an answer has."""

    @property
    def name(self):
        return "test/letters"

    def options(self):
        return {}

    def score(self, groups):
        return [tuple(float(sum(c.isalpha() for c in each.text)) for each in g.completions) for g in groups]


def go(folder):
    """A run of eight steps with a checkpoint after every second."""
    model = tiny()
    prompts = [Prompt(messages=user(text)) for text in ("hello", "why?")]
    options = TrainOptions(batch=2, learning_rate=1e-2, lora_rank=2, epochs=8, save_every=2)
    online = OnlineOptions(k=3, max_tokens=5, kl_budget=1e9, length_change=None, kl_target=0.5)
    return learn(model, Task(prompts, Mixture.of([Part(Letters())])), RLOO(), options, online, folder=Path(folder)), model


def kill_at_checkpoint():
    save, seen = safetensors.torch.save_file, []

    def saved(tensors, path, *args, **kwargs):
        seen.append(path)
        if len(seen) == 6:  # weights and optimizer of the third
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, path, *args, **kwargs)

    safetensors.torch.save_file = saved


if __name__ == "__main__":
    where, *out = sys.argv[1:]
    if not out:
        kill_at_checkpoint()
    result, model = go(where)
    weights = {n: p.detach().flatten().tolist() for n, p in model.module.named_parameters() if p.requires_grad}
    found = {"weights": weights, "answers": result.answers, "reward": [h["reward"] for h in result.history], "k3": [h["k3"] for h in result.history]}
    Path(f"{out[0]}.{os.environ['RANK']}").write_text(json.dumps(found), encoding="utf-8")
