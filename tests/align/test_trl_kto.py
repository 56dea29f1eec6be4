"""KTO's value and gradient, with its mismatched pairs, against TRL's trainer on the same batch and the same tiny llama, in float32."""

import json
import warnings

import pytest
import torch

from fiducial.align.kto import KTO
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.data.formats import read_groups
from fiducial.models.scripted import tiny
from fiducial.training import loop, updates
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions

pytest.importorskip("trl", reason="TRL is not installed: pip install 'fiducial[train]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'fiducial[train]'")

WEIGHTS = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
ROWS = [("hello there", "no", True), ("hear me out", "sure, at once", False), ("why?", "because", True), ("and then?", "nothing", False)]


PAIRS = [("hello there", "yes, hello", "no", 8.0, 3.0), ("why?", "because", "so what", 2.0, 1.0), ("and then?", "nothing", "sure, at once", -1.0, -4.0)]
"""With scores, both above 0 or both below it."""


def singles():
    return [Group(prompt=Prompt(messages=user(q)), completions=(Completion(text=a),), rewards=(1.0 if good else -1.0,)) for q, a, good in ROWS]


def pairs(tmp_path):
    names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in PAIRS))
    return read_groups(tmp_path / "pairs.jsonl")


def ours(objective, reference, groups, folder):
    """Loss, gradient and reference point of one step over all groups, in their order."""
    kept = {}

    def table(model, data, objective, folder):
        return data.parts.with_logp(data.place(range(len(data.groups)), reference.score(data.paths).path_logp))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates.Trainables, "publish", lambda self: kept.update({n: m.grad.clone() for n, m in self.masters.items() if m.grad is not None}))
        patch.setattr(loop, "batch", lambda step, count, options: list(range(count)))
        patch.setattr(loop, "_reference", table)
        patch.setattr(updates, "APART", float("inf"))
        patch.setattr(loop, "_mismatched", lambda model, data, *_: [reference.score(data.mismatched(range(len(groups)))).path_logp])
        options = TrainOptions(batch=len(groups), lora_rank=0, learning_rate=1e-9, clip=1e9)
        result = train(tiny(), groups, objective, options, folder=folder)
    return result.history[0]["loss"], kept, result.history[0].get("reference_point")


def columns(model, prompts, **answers):
    return {"prompt": [model.chat.render(user(q)) for q in prompts]} | {name: [a + "<|im_end|>" for a in texts] for name, texts in answers.items()}


def theirs(model, reference, data, folder, **options):
    from trl import KTOConfig, KTOTrainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer alone
        config = KTOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=None,
            per_device_train_batch_size=len(data["prompt"]) * (2 if "chosen" in data else 1), **options,
        )  # fmt: skip
        trainer = KTOTrainer(model.module, reference.module, config, train_dataset=datasets.Dataset.from_dict(data), processing_class=model.tokenizer)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}, trainer._metrics["eval"]["kl"][0]


def sharpened(seed):
    """A tiny llama whose logits are twice those of the seed: the policy is above it on strange answers, so that the reference point is not 0."""
    model = tiny(seed=seed)
    with torch.no_grad():
        model.module.lm_head.weight.mul_(2)
    return model


def compare(tmp_path, rows, kind, loss_type, reference):
    """The reference point, equal on both sides as loss and gradient are. Of pairs TRL makes an answer labelled true and one labelled false."""
    model = tiny()
    if rows == "singles":
        groups, peers = singles(), columns(model, [q for q, _, _ in ROWS], completion=[a for _, a, _ in ROWS]) | {"label": [good for *_, good in ROWS]}
    else:
        prompts, chosen, rejected, *_ = zip(*PAIRS, strict=True)
        groups, peers = pairs(tmp_path), columns(model, prompts, chosen=chosen, rejected=rejected)
    loss, gradient, point = ours(KTO(kind=kind, **WEIGHTS), reference(), groups, tmp_path / "ours")
    peer, other, kl = theirs(model, reference(), peers, tmp_path / "trl", loss_type=loss_type, **WEIGHTS)
    assert loss == pytest.approx(peer, rel=1e-5)
    assert point == pytest.approx(kl, rel=1e-4, abs=1e-5)
    a, b = (torch.cat([g[n].flatten().double() for n in sorted(g)]) for g in (gradient, other))
    assert float((a - b).norm() / b.norm()) < 1e-5
    return kl


KINDS = pytest.mark.parametrize(("kind", "loss_type"), [("kto", "kto"), ("apo_zero", "apo_zero_unpaired")])


@KINDS
@pytest.mark.parametrize(("rows", "seed"), [("singles", 3), ("singles", 5), ("pairs", 3)])
def test_kto_equals_trl(tmp_path, rows, kind, loss_type, seed):
    compare(tmp_path, rows, kind, loss_type, lambda: tiny(seed=seed))


@KINDS
def test_kto_equals_trl_where_the_reference_point_is_not_zero(tmp_path, kind, loss_type):
    kl = compare(tmp_path, "singles", kind, loss_type, lambda: sharpened(3))
    assert kl == 0 if kind == "apo_zero" else kl > 1
