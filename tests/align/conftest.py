"""Log-probabilities by hand."""

import pytest
import torch

from fiducial.training.objective import GroupLogProbs


@pytest.fixture
def group():
    """Makes G groups from rows of summed log-probabilities; preference 1 for the first completion unless `targets` says otherwise."""

    def made(*rows, targets=None, length=None, mask=None, grad=False):
        logp = torch.tensor(rows, dtype=torch.float32, requires_grad=grad)
        shape = logp.shape
        if targets is None:
            targets = [[1.0] + [0.0] * (shape[1] - 1)] * shape[0]
        return GroupLogProbs(
            logp,
            torch.tensor(length) if length else torch.ones(shape, dtype=torch.long),
            torch.tensor(mask) if mask else torch.ones(shape, dtype=torch.bool),
            torch.tensor(targets),
            torch.full(shape, float("nan")),
            torch.ones(shape[0]),
        )

    return made
