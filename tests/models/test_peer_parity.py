"""The same numbers as the tools people use: lm-eval's multiple choice and TRL's DPO loss and gradient, on the same token ids."""

import copy
import random
from statistics import median

import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.forest import Paths
from fiducial.models.scoring import Engine
from fiducial.models.tiny import tiny
from fiducial.training.objective import layout

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own warnings


@pytest.fixture
def tokenizer():
    """Words w0 to w63 as ids 0 to 63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", bos_token="w1", eos_token="w2")


@pytest.fixture(scope="module")
def smollm2():
    """The embedded model in float32, of which the last block is trained."""
    from transformers import AutoModelForCausalLM

    from fiducial.models.embedded import folder

    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).eval().requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    return model


def questions(seed: int, *, groups: int, choices: int, tokens: tuple[int, int] = (3, 64)) -> list[tuple[list[int], list[list[int]]]]:
    draw = random.Random(seed)
    return [
        ([draw.randrange(*tokens) for _ in range(draw.randint(5, 20))], [[draw.randrange(*tokens) for _ in range(draw.randint(1, 8))] for _ in range(choices)])
        for _ in range(groups)
    ]


ORDINARY = (1000, 20_000)
"""Tokens of the embedded model that were trained."""


def multiple_choice(model, tokenizer, asked):
    """What lm-eval says of every answer, and the same paths for the engine."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    peer = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, max_length=64)
    requests = [(("", ""), prompt, answer) for prompt, answers in asked for answer in answers]
    said = peer._loglikelihood_tokens(requests, disable_tqdm=True)
    group = [number for number, (_, answers) in enumerate(asked) for _ in answers]
    return torch.tensor([logp for logp, _ in said]), [greedy for _, greedy in said], Paths.of([(p + a, len(p)) for _, p, a in requests], group=group)


def test_multiple_choice_log_likelihoods_equal_those_of_lm_eval(tokenizer):
    model = tiny("llama", vocab=64)
    theirs, greedy, paths = multiple_choice(model, tokenizer, questions(0, groups=4, choices=4))
    ours = Engine(model, backend="tree").score(paths)
    assert (ours.path_logp - theirs).abs().max() < 1e-4
    assert ours.is_greedy.tolist() == greedy


@pytest.mark.smollm2
def test_multiple_choice_log_likelihoods_of_the_embedded_model_equal_those_of_lm_eval(tokenizer, smollm2):
    theirs, greedy, paths = multiple_choice(smollm2, tokenizer, questions(0, groups=2, choices=3, tokens=ORDINARY))
    ours = Engine(smollm2, backend="tree").score(paths)
    assert ((ours.path_logp - theirs).abs() < 1e-4 * (1 + ours.path_len / 10)).all()
    assert ours.is_greedy.tolist() == greedy


def test_bfloat16_errors_are_smaller_than_those_of_lm_eval(tokenizer):
    """Both against float32, over models, since one alone may go either way; lm-eval normalises and adds up in the model's own type."""
    found = []
    for seed in range(20):
        narrow = tiny("llama", vocab=64, num_hidden_layers=4, seed=seed, dtype=torch.bfloat16)
        theirs, _, paths = multiple_choice(narrow, tokenizer, questions(seed, groups=4, choices=4))
        exact = Engine(copy.deepcopy(narrow).float(), backend="padded").score(paths).path_logp
        ours = Engine(narrow, backend="tree").score(paths).path_logp
        found.append(float((ours - exact).abs().mean() / (theirs - exact).abs().mean()))
    assert median(found) < 0.9


def trls(policy, reference, tokenizer, folder, pairs):
    """Loss and gradient of TRL's DPOTrainer."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    text = [{"prompt": " w3 w4", "chosen": " w5", "rejected": " w6"}]
    settings = DPOConfig(output_dir=str(folder), use_cpu=True, report_to=[], beta=0.3, bf16=False, disable_dropout=True, gradient_checkpointing=False)
    trainer = DPOTrainer(model=policy, ref_model=reference, args=settings, train_dataset=Dataset.from_list(text), processing_class=tokenizer)
    rows = [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} for prompt, (chosen, rejected) in pairs]
    return with_gradient(policy, trainer.compute_loss(policy, trainer.data_collator(rows)))


def ours(policy, reference, pairs):
    """The same from rows of the engine under align/dpo."""
    paths = Paths.of([(prompt + a, len(prompt)) for prompt, answers in pairs for a in answers], group=[n for n, _ in enumerate(pairs) for _ in range(2)])
    groups = [Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="b"), Completion(text="c"))) for _ in pairs]
    parts = layout(groups, [[len(a) for a in answers] for _, answers in pairs])
    score, base = Engine(policy, backend="tree").score(paths, grad=True).path_logp, Engine(reference).score(paths).path_logp
    return with_gradient(policy, DPO(beta=0.3)(parts.with_logp(score.view(-1, 2)), parts.with_logp(base.view(-1, 2))).mean())


def with_gradient(policy, loss):
    policy.zero_grad(set_to_none=True)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])
    policy.zero_grad(set_to_none=True)
    return loss.item(), gradient


def assert_alike(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert abs(one[0] - 0.6931) > 1e-2  # the reference is another model
    assert (one[1] - other[1]).norm() / other[1].norm() < 1e-5


def test_dpo_loss_and_gradient_equal_those_of_trl(tokenizer, tmp_path):
    policy, reference, pairs = tiny("llama", vocab=64), tiny("llama", vocab=64, seed=1), questions(1, groups=3, choices=2)
    theirs = trls(policy, reference, tokenizer, tmp_path, pairs)
    assert_alike(ours(policy, reference, pairs), theirs)


@pytest.mark.smollm2
def test_dpo_loss_and_gradient_of_the_embedded_model_equal_those_of_trl(tokenizer, tmp_path, smollm2):
    reference, pairs = copy.deepcopy(smollm2).requires_grad_(False), questions(1, groups=2, choices=2, tokens=ORDINARY)
    with torch.no_grad():
        reference.model.norm.weight.mul_(1.1)
    theirs = trls(smollm2, reference, tokenizer, tmp_path, pairs)
    assert_alike(ours(smollm2, reference, pairs), theirs)
