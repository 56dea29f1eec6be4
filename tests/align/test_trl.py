"""Values and gradients against the loss code of TRL's trainers, on the same log-probabilities in float32.

TRL's trainers get a model whose output is a free tensor, so that the gradient is that of the loss alone, with respect to logits: it
holds the gradient with respect to every log-probability.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch

from fiducial.align.apo import APO
from fiducial.align.cpo import CPO
from fiducial.align.dpo import DPO
from fiducial.align.exo import EXO
from fiducial.align.hinge import Hinge
from fiducial.align.ipo import IPO
from fiducial.align.orpo import ORPO
from fiducial.align.robust_dpo import RobustDPO
from fiducial.align.simpo import SimPO
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scripted import tiny
from fiducial.training import updates
from fiducial.training.data import Data
from fiducial.training.loop import train
from fiducial.training.objective import GroupLogProbs
from fiducial.training.options import TrainOptions

pytest.importorskip("trl", reason="TRL is not installed: pip install 'fiducial[train]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'fiducial[train]'")

VOCABULARY, SIZES, UNEQUAL = 11, [[3, 5], [3, 2], [3, 6], [3, 3]], [[3, 5], [6, 2], [1, 6], [4, 4]]
"""Tokens of chosen and rejected completions. Where chosen ones are equally long, a mean over tokens is one over completions."""
CPU = {"use_cpu": True, "bf16": False, "fp16": False, "gradient_checkpointing": False, "report_to": []}


class Batch:
    """Pairs after a prompt of one token, as TRL lays them out: chosen rows above rejected ones, padded on the right."""

    def __init__(self, sizes):
        random = torch.Generator().manual_seed(0)
        self.size, sizes = len(sizes), torch.tensor(sizes).T.flatten()
        width = 1 + int(sizes.max())
        self.ids = torch.randint(1, VOCABULARY, (2 * self.size, width), generator=random)
        self.attention = (torch.arange(width) <= sizes.unsqueeze(1)).long()
        self.completion = self.attention.clone()
        self.completion[:, 0] = 0
        self.logits = (2 * torch.randn(*self.ids.shape, VOCABULARY, generator=random)).requires_grad_()
        self.reference_logits = self.logits.detach() + 0.7 * torch.randn(self.logits.shape, generator=random)

    def per_token(self, logits):
        """Log-probability of each token but the first, 0 outside the completion, [rows, width - 1]."""
        logp = logits[:, :-1].log_softmax(-1).gather(2, self.ids[:, 1:].unsqueeze(2)).squeeze(2)
        return logp * self.completion[:, 1:]

    def groups(self, logits):
        """The same as groups of two completions."""
        logp = self.per_token(logits).sum(1).view(2, -1).T
        ones = torch.ones(self.size)
        length = self.completion.sum(1).view(2, -1).T
        return GroupLogProbs(logp, length, length > 0, torch.stack([ones, 0 * ones], 1), torch.full(logp.shape, float("nan")), ones)

    def ours(self, objective):
        """Mean loss and its gradient with respect to the logits."""
        reference = self.groups(self.reference_logits) if objective.needs_reference else None
        loss = objective(self.groups(self.logits), reference).mean()
        return loss.detach(), torch.autograd.grad(loss, self.logits)[0]


@pytest.fixture
def batch():
    return Batch(SIZES)


@pytest.fixture
def model():
    return tiny()


def compare(one, other):
    assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-5)
    assert float((one[1] - other[1]).norm() / other[1].norm()) < 1e-5


def dpo_trainer(batch, model, folder, **options):
    """Loss and gradient of TRL's DPOTrainer."""
    from trl import DPOConfig, DPOTrainer

    def answering(logits):
        def forward(**inputs):
            logp = batch.per_token(logits)
            return SimpleNamespace(log_probs=logp, entropy=logp.detach(), mean_logits=logp.detach(), is_top1=logp > 0)

        return forward

    trainer = built(DPOTrainer, DPOConfig, model, folder, ref_model=tiny(seed=1).module, precompute_ref_log_probs=False, **options)
    trainer.ref_model = answering(batch.reference_logits)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention, "completion_mask": batch.completion}
    loss = trainer.compute_loss(answering(batch.logits), inputs)
    return loss.detach(), torch.autograd.grad(loss, batch.logits)[0]


def contrastive_trainer(kind, batch, model, folder, **options):
    """Loss and gradient of TRL's CPOTrainer or ORPOTrainer."""
    if kind == "cpo":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

    trainer = built(Trainer, Config, model, folder, **options)
    labels = batch.ids.masked_fill(batch.completion == 0, -100)
    inputs = {}
    for name, rows in (("chosen", slice(0, batch.size)), ("rejected", slice(batch.size, None))):
        inputs |= {f"{name}_input_ids": batch.ids[rows], f"{name}_attention_mask": batch.attention[rows], f"{name}_labels": labels[rows]}
    loss = trainer.compute_loss(lambda *_, **__: SimpleNamespace(logits=batch.logits), inputs)
    return loss.detach(), torch.autograd.grad(loss, batch.logits)[0]


def built(trainer, config, model, folder, *, ref_model=None, **options):
    """A trainer made from its own configuration."""
    rows = datasets.Dataset.from_dict({"prompt": ["a b"], "chosen": [" c"], "rejected": [" d"]})
    extra = {"ref_model": ref_model} if ref_model is not None else {}
    return trainer(model=model.module, args=config(output_dir=str(folder), **CPU, **options), train_dataset=rows, processing_class=model.tokenizer, **extra)


@pytest.fixture(autouse=True)
def _peer_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        pytest.param(DPO(beta=0.3), {"loss_type": "sigmoid"}, id="sigmoid"),
        pytest.param(IPO(beta=0.3), {"loss_type": "ipo"}, id="ipo"),
        pytest.param(RobustDPO(beta=0.3, label_smoothing=0.2), {"loss_type": "robust", "label_smoothing": 0.2}, id="robust"),
        pytest.param(EXO(beta=0.3, label_smoothing=0.01), {"loss_type": "exo_pair", "label_smoothing": 0.01}, id="exo_pair"),
        pytest.param(APO(beta=0.3), {"loss_type": "apo_zero"}, id="apo_zero"),
        pytest.param(APO(beta=0.3, variant="down"), {"loss_type": "apo_down"}, id="apo_down"),
    ],
)
def test_losses_with_a_reference_equal_those_of_the_dpo_trainer(batch, model, tmp_path, objective, options):
    compare(batch.ours(objective), dpo_trainer(batch, model, tmp_path, beta=0.3, **options))


def test_the_hinge_equals_that_of_the_dpo_trainer_on_both_sides_of_its_margin(batch, model, tmp_path):
    objective = Hinge(beta=3.0)
    policy, reference = (batch.groups(logits.detach()) for logits in (batch.logits, batch.reference_logits))
    z = 3.0 * ((policy.logp - reference.logp) @ torch.tensor([1.0, -1.0]))
    assert z.min() < 1 < z.max()
    compare(batch.ours(objective), dpo_trainer(batch, model, tmp_path, beta=3.0, loss_type="hinge"))


@pytest.mark.parametrize(("objective", "sizes"), [(ORPO(beta=0.3), SIZES), (ORPO(beta=0.3, mean="token"), UNEQUAL)], ids=["sequence", "token"])
def test_orpo_equals_that_of_the_orpo_trainer(model, tmp_path, objective, sizes):
    """After a prompt of one token: TRL's first term is over prompts too."""
    batch = Batch(sizes)
    compare(batch.ours(objective), contrastive_trainer("orpo", batch, model, tmp_path, beta=0.3))


ROWS = [("hello there", "yes, hello", "no"), ("why?", "because it is so", "so what"), ("and then, what came of it?", "no", "sure, at once")]


def test_orpo_over_whole_texts_equals_that_of_the_orpo_trainer_on_prompts_and_answers_of_any_length(tmp_path):
    """Loss and gradient of all weights of a tiny llama; TRL is given the same tokens."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    groups = [Group(prompt=Prompt(messages=user(q)), completions=(Completion(text=a), Completion(text=b))) for q, a, b in ROWS]
    peer, kept = tiny(), {}
    paths = Data.of(peer, groups, ORPO(), TrainOptions()).paths
    assert len(set(paths.start[::2])) == len({len(ids) - start for ids, start in zip(paths.ids[::2], paths.start[::2], strict=True)}) == len(ROWS)
    inputs = {}
    for k, name in enumerate(("chosen", "rejected")):
        ids, start = paths.ids[k::2], paths.start[k::2]
        width = max(map(len, ids))
        inputs[f"{name}_input_ids"] = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
        inputs[f"{name}_attention_mask"] = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        inputs[f"{name}_labels"] = torch.tensor([[-100] * s + row[s:] + [-100] * (width - len(row)) for row, s in zip(map(list, ids), start, strict=True)])
    trainer = built(ORPOTrainer, ORPOConfig, peer, tmp_path / "trl", beta=0.3)
    theirs = trainer.compute_loss(peer.module, inputs)
    theirs.backward()
    other = {n: p.grad for n, p in peer.module.named_parameters() if p.grad is not None}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates.Trainables, "publish", lambda self: kept.update({n: m.grad.clone() for n, m in self.masters.items() if m.grad is not None}))
        options = TrainOptions(batch=len(groups), lora_rank=0, learning_rate=1e-9, clip=1e9)
        found = train(tiny(), groups, ORPO(beta=0.3, mean="token", likelihood="text"), options, folder=tmp_path / "ours")
    assert found.history[0]["loss"] == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert kept.keys() == other.keys()
    a, b = (torch.cat([g[n].flatten().double() for n in sorted(g)]) for g in (kept, other))
    assert float((a - b).norm() / b.norm()) < 1e-5


def test_a_mean_over_completions_is_another_where_chosen_ones_differ_in_length(model, tmp_path):
    batch = Batch(UNEQUAL)
    for kind, objective in (("orpo", ORPO(beta=0.3)), ("cpo", CPO(beta=0.3))):
        ours, theirs = batch.ours(objective)[0], contrastive_trainer(kind, batch, model, tmp_path, beta=0.3)[0]
        assert abs(float(ours) - float(theirs)) > 0.01


def test_simpo_equals_that_of_the_cpo_trainer_without_its_likelihood_term(batch, model, tmp_path):
    peer = contrastive_trainer("cpo", batch, model, tmp_path, loss_type="simpo", beta=2.5, simpo_gamma=1.0, cpo_alpha=0.0)
    compare(batch.ours(SimPO(beta=2.5, gamma_beta_ratio=0.4)), peer)


@pytest.mark.parametrize(("mean", "sizes"), [("sequence", SIZES), ("token", UNEQUAL)])
def test_cpo_equals_that_of_the_cpo_trainer(model, tmp_path, mean, sizes):
    batch = Batch(sizes)
    peer = contrastive_trainer("cpo", batch, model, tmp_path, loss_type="sigmoid", beta=0.3, cpo_alpha=0.5)
    compare(batch.ours(CPO(beta=0.3, anchor=0.5, mean=mean)), peer)


def test_conservative_dpo_under_a_flat_reference_equals_the_smoothed_loss_of_the_cpo_trainer(batch, model, tmp_path):
    # the DPO trainer has no conservative loss: it ignores label smoothing with the sigmoid
    peer = contrastive_trainer("cpo", batch, model, tmp_path, loss_type="sigmoid", beta=0.3, cpo_alpha=0.0, label_smoothing=0.1)
    policy = batch.groups(batch.logits)
    loss = DPO(beta=0.3, label_smoothing=0.1)(policy, policy.with_logp(torch.zeros_like(policy.logp))).mean()
    compare((loss.detach(), torch.autograd.grad(loss, batch.logits)[0]), peer)
