"""The same numbers as the tools people use: lm-eval's multiple choice and TRL's DPO loss and gradient, on the same token ids."""

import random

import pytest
import torch
from torch.nn import functional as F

from fiducial.models.forest import Paths
from fiducial.models.scoring import Engine
from fiducial.models.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own warnings


@pytest.fixture
def tokenizer():
    """Words w0 to w63 as ids 0 to 63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", bos_token="w1", eos_token="w2")


def questions(seed: int, *, groups: int, choices: int) -> list[tuple[list[int], list[list[int]]]]:
    draw = random.Random(seed)
    return [
        ([draw.randrange(3, 64) for _ in range(draw.randint(5, 20))], [[draw.randrange(3, 64) for _ in range(draw.randint(1, 8))] for _ in range(choices)])
        for _ in range(groups)
    ]


def test_multiple_choice_log_likelihoods_equal_those_of_lm_eval(tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model, asked = tiny("llama", vocab=64), questions(0, groups=4, choices=4)
    peer = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, max_length=64)
    requests = [(("", ""), prompt, answer) for prompt, answers in asked for answer in answers]
    theirs = peer._loglikelihood_tokens(requests, disable_tqdm=True)
    ours = Engine(model, backend="tree").score(Paths.of((prompt + answer, len(prompt)) for _, prompt, answer in requests))
    assert (ours.path_logp - torch.tensor([logp for logp, _ in theirs])).abs().max() < 1e-4
    assert ours.is_greedy.tolist() == [greedy for _, greedy in theirs]


def test_dpo_loss_and_gradient_equal_those_of_trl(tokenizer, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference, pairs = tiny("llama", vocab=64), tiny("llama", vocab=64, seed=1), questions(1, groups=3, choices=2)
    text = [{"prompt": " w3 w4", "chosen": " w5", "rejected": " w6"}]
    settings = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], beta=0.3, bf16=False, disable_dropout=True, gradient_checkpointing=False)
    trainer = DPOTrainer(model=policy, ref_model=reference, args=settings, train_dataset=Dataset.from_list(text), processing_class=tokenizer)
    rows = [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} for prompt, (chosen, rejected) in pairs]
    theirs = trainer.compute_loss(policy, trainer.data_collator(rows))
    theirs.backward()
    their_gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    policy.zero_grad(set_to_none=True)

    paths = Paths.of([(prompt + answer, len(prompt)) for prompt, answers in pairs for answer in answers], group=[0, 0, 1, 1, 2, 2])
    score, base = Engine(policy, backend="tree").score(paths, grad=True).path_logp, Engine(reference).score(paths).path_logp
    margin = (score - base)[0::2] - (score - base)[1::2]
    ours = -F.logsigmoid(0.3 * margin).mean()
    ours.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert abs(ours.item() - theirs.item()) < 1e-5
    assert (gradient - their_gradient).norm() / their_gradient.norm() < 1e-5
