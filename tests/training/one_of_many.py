"""Trains a tiny model and writes what came of it; run by several processes at once, or to be killed.

python one_of_many.py OUT FOLDER OBJECTIVE RANK EPOCHS [KILL_AT_STEP]
"""

import json
import os
import signal
import sys
from pathlib import Path

from fiducial.align.dft import DFT
from fiducial.align.dpo import DPO
from fiducial.align.kto import KTO
from fiducial.align.reward_model import RewardModel
from fiducial.align.sft import SFT
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scripted import tiny
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions


def groups():
    texts = [("no" + "o" * 3 * n, "yes, " + "e" * (n + 1)) for n in range(7)]
    return [
        Group(prompt=Prompt(messages=user(f"question {n}")), completions=tuple(Completion(text=t) for t in pair), weight=1.0 + n % 2)
        for n, pair in enumerate(texts)
    ]


def main(out, folder, objective, rank, epochs, kill_at="0"):
    def report(step, steps, figures):
        if step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    model = tiny()
    chosen = {"sft": SFT(), "dpo": DPO(beta=0.5), "dft": DFT(), "kto": KTO(beta=0.5), "reward_model": RewardModel()}[objective]
    options = TrainOptions(batch=3, epochs=float(epochs), learning_rate=1e-3, lora_rank=int(rank), save_every=2)
    result = train(model, groups(), chosen, options, folder=Path(folder), report=report)
    if os.environ.get("RANK", "0") == "0":
        weights = {n: p.detach().flatten().tolist() for n, p in model.module.named_parameters() if p.requires_grad}
        if model.head:
            weights["head"] = model.head.weight.tolist()
        found = {"fingerprint": model.fingerprint, "losses": [h["loss"] for h in result.history], "tokens": result.naive_tokens, "weights": weights}
        Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
