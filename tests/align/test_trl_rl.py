"""Losses and gradients with respect to token log-probabilities against TRL's own trainers, from the same rewards, in float32.

Their code for advantages and loss runs as it is; only generation and the network are replaced by tables.
"""

import warnings

import pytest
import torch

from fiducial.align.grpo import GRPO
from fiducial.align.rloo import RLOO
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.scripted import tiny
from fiducial.training.objective import layout

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

K, ROOM = 3, 9
LENGTHS = [[3, 6, 4], [5, 2, 6]]
FLAT = [n for group in LENGTHS for n in group]
REWARDS = [1.0, 0.0, 2.5, -1.0, 0.5, 0.25]


def tables():
    """Log-probabilities [6, 6] when sampled, now and under the reference: far enough apart that every clip is at work."""
    source = torch.Generator().manual_seed(4)
    old = -2 * torch.rand(6, 6, generator=source)
    return old, old + 0.5 * torch.randn(6, 6, generator=source), old + 0.3 * torch.randn(6, 6, generator=source)


def flat(table):
    return torch.cat([row[:n] for row, n in zip(table, FLAT, strict=True)])


def ours(objective, rewards=REWARDS):
    """Loss of the step and its gradient, [6, 6]."""
    old, now, reference = tables()
    values = [rewards[:K], rewards[K:]]
    groups = [Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="b"),) * K, rewards=tuple(v)) for v in values]
    plain = layout(groups, LENGTHS, {})
    lessons = objective.lessons(plain.with_tokens(flat(old)), plain.with_tokens(flat(reference)), room=ROOM)
    parts = layout(groups, LENGTHS, {**lessons.given, "old": flat(old)})
    leaf = now.clone().requires_grad_()
    losses = objective(parts.with_tokens(flat(leaf)), parts.with_tokens(flat(reference)))
    loss = losses.sum() / objective.size(parts).sum()
    loss.backward()
    return float(loss.detach()), leaf.grad


def theirs(kind, tmp_path, rewards=REWARDS, *, beta, **options):
    """The same from the trainer `kind`, whose policy is not touched."""
    import trl

    old, now, reference = tables()
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer alone
        shape = {"per_device_train_batch_size": 2 * K, "num_generations": K, "num_iterations": 2, "max_completion_length": ROOM}
        config = getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path), beta=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], **shape, **options
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model.module,
            reward_funcs=lambda completions, **_: list(rewards),
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=model.tokenizer,
        )
        # with a beta of its own it would load a reference by the model's name; a table needs none
        trainer.beta, trainer.ref_model = beta, tiny(seed=1).module
        drawn = [[5] * n for n in FLAT]
        texts = ["x"] * len(drawn)
        prompts = [[7, 8]] * len(drawn)
        trainer._generate = lambda _: (prompts, drawn, texts) if kind == "RLOO" else (prompts, drawn, None, texts, None, {}, None, [])
        answer = {"policy": old}

        def table(network, *_, **__):
            return (reference if network is trainer.ref_model else answer["policy"]), torch.zeros(6, 6), None

        trainer._get_per_token_logps_and_entropies = table
        inputs = trainer._generate_and_score_completions([{"prompt": p} for p in ["a"] * K + ["b"] * K])
        answer["policy"] = leaf = now.clone().requires_grad_()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
    return float(loss.detach()), leaf.grad


def compare(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-6)
    assert other[1].abs().max() > 1e-3
    assert float((one[1] - other[1]).norm() / other[1].norm()) < 1e-5


@pytest.mark.parametrize(("mean", "kind"), [("sequence", "grpo"), ("token", "bnpo"), ("constant", "dr_grpo")])
def test_grpo_equals_trl_for_every_mean(tmp_path, mean, kind):
    found = ours(GRPO(beta=0.1, mean=mean))
    compare(found, theirs("GRPO", tmp_path, beta=0.1, loss_type=kind))


def test_grpo_equals_trl_with_a_wider_upper_clip_and_no_kl(tmp_path):
    compare(ours(GRPO(beta=0.0, clip_high=0.28)), theirs("GRPO", tmp_path, beta=0.0, loss_type="grpo", epsilon_high=0.28))


def test_grpo_without_division_equals_trl(tmp_path):
    compare(ours(GRPO(beta=0.04, scale="none")), theirs("GRPO", tmp_path, beta=0.04, loss_type="grpo", scale_rewards="none"))


def test_rloo_equals_trl_with_the_kl_in_the_reward(tmp_path):
    compare(ours(RLOO(beta=0.2)), theirs("RLOO", tmp_path, beta=0.2))


def test_rloo_equals_trl_without_a_kl(tmp_path):
    compare(ours(RLOO(beta=0.0)), theirs("RLOO", tmp_path, beta=0.0))
