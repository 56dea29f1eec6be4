"""Log-probabilities by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fiducial.training.objective import GroupLogProbs


@pytest.fixture
def group():
    """Makes G groups from rows of summed log-probabilities; preference 1 for the first completion unless `targets` says otherwise."""

    def made(*rows, targets=None, length=None, mask=None, rewards=None, grad=False):
        logp = torch.tensor(rows, dtype=torch.float32, requires_grad=grad)
        shape = logp.shape
        if targets is None:
            targets = [[1.0] + [0.0] * (shape[1] - 1)] * shape[0]
        return GroupLogProbs(
            logp,
            torch.tensor(length) if length else torch.ones(shape, dtype=torch.long),
            torch.tensor(mask) if mask else torch.ones(shape, dtype=torch.bool),
            torch.tensor(targets),
            torch.tensor(rewards, dtype=torch.float32) if rewards else torch.full(shape, float("nan")),
            torch.ones(shape[0]),
        )

    return made


@pytest.fixture
def pairs(group):
    """32 random pairs under a policy and a reference, and their parts as numpy columns in float64; `h` is the unscaled margin."""
    rng = np.random.default_rng(0)
    length = rng.integers(1, 9, (32, 2))
    both = -rng.uniform(0.1, 4.0, (2, 32, 2)).astype("float32") * length.astype("float32")
    p = np.concatenate([np.ones(8), np.zeros(8), rng.uniform(0, 1, 16)]).astype("float32")
    made = [group(*rows.tolist(), targets=np.stack([p, 1 - p], 1).tolist(), length=length.tolist(), grad=True) for rows in both]
    (w, l), (w_ref, l_ref) = (rows.astype("float64").T for rows in both)  # noqa: E741
    return SimpleNamespace(
        policy=made[0], reference=made[1], w=w, l=l, w_ref=w_ref, l_ref=l_ref, p=p.astype("float64"), w_len=length[:, 0], l_len=length[:, 1],
        h=(w - w_ref) - (l - l_ref),
    )  # fmt: skip


@pytest.fixture
def settled():
    """Follows an objective's gradient on a table of log-ratios, from 0, until it is flat, [G, K]."""

    def found(objective, groups, *, rate, steps=400):
        ratio = torch.zeros(groups.logp.shape, dtype=torch.float64, requires_grad=True)
        reference = groups.with_logp(torch.zeros_like(ratio))
        for _ in range(steps):
            (pull,) = torch.autograd.grad(objective(groups.with_logp(ratio), reference).sum(), ratio)
            ratio = (ratio - rate * pull).detach().requires_grad_()
        assert pull.abs().max() < 1e-6
        return ratio.detach()

    return found


@pytest.fixture
def pull():
    """The gradient of the loss of one hard pair with respect to its two log-probabilities, and the loss."""

    def found(objective, policy, reference=None):
        loss = objective(policy, reference)
        (gradient,) = torch.autograd.grad(loss.sum(), policy.logp)
        return gradient.tolist()[0], loss.item()

    return found
