"""Losses and gradients against TRL's trainers on the same batch and the same tiny llama, in float32."""

import warnings

import pytest
import torch
from accelerate import Accelerator

from fiducial.align.dft import DFT
from fiducial.align.dpo import DPO
from fiducial.align.grpo import GRPO
from fiducial.align.sft import SFT
from fiducial.models.scripted import tiny
from fiducial.training import loop, lora, samples, updates
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PROMPTS = ["hello there", "hear me out", "why?"]
CHOSEN = ["no", "I would rather not do that here", "because"]
REJECTED = ["yes, the first step is this", "sure", "he he he"]


def groups():
    from fiducial.core.records import Completion, Group, Prompt, user

    rows = zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    return [Group(prompt=Prompt(messages=user(p)), completions=(Completion(text=c), Completion(text=r))) for p, c, r in rows]


def ours(objective, tmp_path, model=None):
    """Loss and gradient of one step over all groups."""
    kept = {}
    model = model or tiny()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates.Trainables, "publish", lambda self: kept.update({n: m.grad.clone() for n, m in self.masters.items() if m.grad is not None}))
        options = TrainOptions(batch=3, lora_rank=0, learning_rate=1e-9, clip=1e9)
        result = train(model, groups(), objective, options, folder=tmp_path)
    return result.history[0]["loss"], kept


def theirs(trainer, rows):
    """Loss and gradient that a TRL trainer computes for a batch of its own collator."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def compare(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    a, b = (torch.cat([g[n].flatten().double() for n in sorted(g)]) for g in (one[1], other[1]))
    assert float((a - b).norm() / b.norm()) < 1e-5


def texts(model):
    """Prompt and completions as TRL is given them, rendered by our chat format so that both see the same tokens."""
    prompts = [model.chat.render(g.prompt.messages) for g in groups()]
    return {"prompt": prompts, "chosen": [c + "<|im_end|>" for c in CHOSEN], "rejected": [r + "<|im_end|>" for r in REJECTED]}


def tokens(model):
    """Rows as both of TRL's collators take them: token ids of prompt and completions."""
    rows = []
    for g in groups():
        row = {}
        for name, completion in zip(("chosen", "rejected"), g.completions, strict=True):
            ids, start = model.encode(g.prompt.messages, completion.text)
            row |= {"prompt_ids": ids[:start], f"{name}_ids": ids[start:]}
        rows.append(row)
    return rows


@pytest.mark.parametrize(("objective", "loss_type"), [(SFT(), "nll"), (DFT(), "dft")], ids=["sft", "dft"])
def test_imitation_equals_trl(tmp_path, objective, loss_type):
    from trl import SFTConfig, SFTTrainer

    model = tiny()
    rows = [{"input_ids": r["prompt_ids"] + r["chosen_ids"], "completion_mask": [0] * len(r["prompt_ids"]) + [1] * len(r["chosen_ids"])} for r in tokens(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer alone
        config = SFTConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], max_length=None, completion_only_loss=True,
            loss_type=loss_type,
        )  # fmt: skip
        trainer = SFTTrainer(tiny().module, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=model.tokenizer)
        peer = theirs(trainer, [trainer.train_dataset[i] for i in range(len(rows))])
    compare(ours(objective, tmp_path / "ours"), peer)


def test_sigmoid_dpo_equals_trl(tmp_path):
    from trl import DPOConfig, DPOTrainer

    model, policy, reference = tiny(), tiny(seed=0), tiny(seed=3)
    rows = tokens(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], beta=0.3, max_length=None)
        data = datasets.Dataset.from_dict(texts(model))
        trainer = DPOTrainer(policy.module, reference.module, config, train_dataset=data, processing_class=model.tokenizer)
        rows = [trainer.train_dataset[i] for i in range(len(rows))]
        peer = theirs(trainer, rows)
    assert [{k: r[k] for k in tokens(model)[0]} for r in rows] == tokens(model)

    # a reference that is not the policy, so that the loss is not log 2 alone
    def table(model, data, objective, folder):
        scores = reference.score(data.paths)
        return data.parts.with_logp(data.place(range(len(data.groups)), scores.path_logp))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_reference", table)
        patch.setattr("fiducial.training.updates.APART", float("inf"))
        found = ours(DPO(beta=0.3), tmp_path / "ours")
    assert abs(found[0] - 0.6931) > 1e-3
    compare(found, peer)


ANSWERS = [[[9, 40, 17], [30, 8, 8, 21, 60, 12], [25]], [[44, 10, 31, 16], [19, 52], [11, 36, 20, 9, 41]]]
"""Tokens of the samples of two prompts."""
REWARDS = [[1.0, 0.0, 2.5], [-1.0, 0.5, 0.25]]


def moved(model):
    """The policy after an update, so that no ratio is 1."""
    with torch.no_grad():
        model.module.lm_head.weight.mul_(1.1)
    return model


def sampled(reference, *, room):
    """Loss and gradient of a step of GRPO on samples of a policy that has moved since."""
    from fiducial.core.records import Completion, Group, Prompt, user

    model, objective = tiny(), GRPO(beta=0.1)
    drawn = [
        Group(prompt=Prompt(messages=user(p)), completions=tuple(Completion(text="x", tokens=tuple(a), finish="length") for a in each), rewards=tuple(r))
        for p, each, r in zip(PROMPTS, ANSWERS, REWARDS, strict=False)
    ]
    data = samples.data(model, drawn, max_length=512)
    old, before = (m.engine.score(data.paths).edge_logp for m in (model, reference))
    lessons = objective.lessons(data.parts.with_tokens(old), data.parts.with_tokens(before), room=room)
    data = samples.with_given(data, {**lessons.given, "old": old})
    lora.make_trainable(moved(model).module)
    one = updates.Updates(model, objective, TrainOptions(batch=2, lora_rank=0, clip=1e9), Accelerator(cpu=True))
    found = one.gradient(data, range(2), reference=data.parts.with_tokens(before))
    return found["loss"], {n: m.grad.clone() for n, m in one.trainables.masters.items()}


def test_a_step_of_grpo_equals_trl(tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    policy, reference = tiny(), tiny(seed=3)
    reference.module.save_pretrained(tmp_path / "reference")
    policy.module.config._name_or_path = str(tmp_path / "reference")  # where it takes its reference from
    asked = [policy.encode(g.prompt.messages)[0] for g in groups()[:2]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = {"per_device_train_batch_size": 6, "num_generations": 3, "num_iterations": 2, "max_completion_length": 9}
        config = GRPOConfig(output_dir=str(tmp_path), beta=0.1, loss_type="grpo", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], **shape)
        data = datasets.Dataset.from_dict({"prompt": ["a", "b"]})
        said = [r for each in REWARDS for r in each]
        trainer = GRPOTrainer(policy.module, reward_funcs=lambda completions, **_: said, args=config, train_dataset=data, processing_class=policy.tokenizer)
        trainer.current_gradient_accumulation_steps = 1
        drawn = [a for each in ANSWERS for a in each]
        trainer._generate = lambda _: ([ids for ids in asked for _ in range(3)], drawn, None, ["x"] * 6, None, {}, None, [])
        inputs = trainer._generate_and_score_completions([{"prompt": p} for p in "aaabbb"])
        moved(policy)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    peer = float(loss.detach()), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert abs(peer[0]) > 1e-3
    compare(sampled(reference, room=9), peer)
