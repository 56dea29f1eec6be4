"""KTO's value and gradient, with its mismatched pairs, against TRL's trainer on the same batch and the same tiny llama, in float32."""

import warnings

import pytest
import torch

from fiducial.align.kto import KTO
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scripted import tiny
from fiducial.training import loop, updates
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions

pytest.importorskip("trl", reason="TRL is not installed: pip install 'fiducial[train]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'fiducial[train]'")

ROWS = [("hello there", "no", True), ("hear me out", "sure, at once", False), ("why?", "because", True), ("and then?", "nothing", False)]


def groups():
    return [Group(prompt=Prompt(messages=user(q)), completions=(Completion(text=a),), rewards=(1.0 if good else -1.0,)) for q, a, good in ROWS]


def ours(objective, reference, tmp_path):
    """Loss, gradient and reference point of one step over all rows, in their order."""
    kept = {}

    def table(model, data, objective, folder):
        return data.parts.with_logp(data.place(range(len(data.groups)), reference.score(data.paths).path_logp))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates.Trainables, "publish", lambda self: kept.update({n: m.grad.clone() for n, m in self.masters.items() if m.grad is not None}))
        patch.setattr(loop, "batch", lambda step, count, options: list(range(count)))
        patch.setattr(loop, "_reference", table)
        patch.setattr(updates, "APART", float("inf"))
        patch.setattr(loop, "_mismatched", lambda model, data, *_: [reference.score(data.mismatched(range(len(ROWS)))).path_logp])
        result = train(tiny(), groups(), objective, TrainOptions(batch=4, lora_rank=0, learning_rate=1e-9, clip=1e9), folder=tmp_path)
    return result.history[0]["loss"], kept, result.history[0].get("reference_point")


def theirs(reference, tmp_path, **options):
    from trl import KTOConfig, KTOTrainer

    model = tiny()
    columns = {
        "prompt": [model.chat.render(user(q)) for q, _, _ in ROWS],
        "completion": [a + "<|im_end|>" for _, a, _ in ROWS],
        "label": [good for *_, good in ROWS],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer alone
        config = KTOConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=None,
            per_device_train_batch_size=len(ROWS), **options,
        )  # fmt: skip
        data = datasets.Dataset.from_dict(columns)
        trainer = KTOTrainer(model.module, reference.module, config, train_dataset=data, processing_class=model.tokenizer)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))]))
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}, trainer._metrics["eval"]["kl"][0]


def sharpened(seed):
    """A tiny llama whose logits are twice those of the seed: the policy is above it on strange answers, so that the reference point is not 0."""
    model = tiny(seed=seed)
    with torch.no_grad():
        model.module.lm_head.weight.mul_(2)
    return model


def compare(tmp_path, kind, loss_type, reference):
    """The reference point, equal on both sides as loss and gradient are."""
    weights = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    loss, gradient, point = ours(KTO(kind=kind, **weights), reference(), tmp_path / "ours")
    peer, other, kl = theirs(reference(), tmp_path, loss_type=loss_type, **weights)
    assert loss == pytest.approx(peer, rel=1e-5)
    assert point == pytest.approx(kl, rel=1e-4, abs=1e-5)
    a, b = (torch.cat([g[n].flatten().double() for n in sorted(g)]) for g in (gradient, other))
    assert float((a - b).norm() / b.norm()) < 1e-5
    return kl


KINDS = pytest.mark.parametrize(("kind", "loss_type"), [("kto", "kto"), ("apo_zero", "apo_zero_unpaired")])


@KINDS
@pytest.mark.parametrize("seed", [3, 5])
def test_kto_equals_trl(tmp_path, kind, loss_type, seed):
    compare(tmp_path, kind, loss_type, lambda: tiny(seed=seed))


@KINDS
def test_kto_equals_trl_where_the_reference_point_is_not_zero(tmp_path, kind, loss_type):
    kl = compare(tmp_path, kind, loss_type, lambda: sharpened(3))
    assert kl == 0 if kind == "apo_zero" else kl > 1
