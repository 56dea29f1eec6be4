"""Scores of shared rows against single forward passes of the same model."""

import copy
import random

import pytest
import torch
from torch import Tensor

from fiducial.core.errors import DataError, ModelError
from fiducial.models.forest import Paths
from fiducial.models.scoring import Engine
from fiducial.models.tiny import SIZES, tiny
from fiducial.training import lora

TAKES_TREES = ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text", "mistral"]
REFUSES_TREES = ["mpt", "mamba2", "jamba", "lfm2", "qwen3_next"]


def questions(seed: int = 0, *, groups: int = 3, choices: int = 3, prompt: int = 14) -> Paths:
    """Prompts with answers, among them an equal pair, an answer that begins another and one-token answers."""
    draw = random.Random(seed)
    pairs, group = [], []
    for number in range(groups):
        start = [5, 6, 7, *(draw.randrange(3, 64) for _ in range(draw.randint(2, prompt)))]
        answers = [[draw.randrange(3, 64) for _ in range(draw.randint(1, 9))] for _ in range(choices)]
        answers += [answers[0], answers[0][:1], [*answers[1], 9]]
        pairs += [(start + answer, len(start)) for answer in answers]
        group += [number] * len(answers)
    return Paths.of(pairs, group=group)


def alone(model, paths: Paths, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(edge log-probabilities, entropies) by one forward pass per path, float32 or the model's wider type."""
    logp, entropy = [], []
    for ids, start in zip(paths.ids, paths.start, strict=True):
        logits = model(torch.tensor([ids])).logits[0]
        whole = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
        rows = whole[start - 1 : len(ids) - 1]
        logp.append(rows.gather(-1, torch.tensor([ids[start:]]).T)[:, 0])
        entropy.append(-(rows.exp() * rows).sum(-1))
    return torch.cat(logp), torch.cat(entropy)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gradient(model, paths: Paths, backend: str) -> Tensor:
    """Gradient of a contrast of each group's paths, all trainable parameters in one vector."""
    model.zero_grad(set_to_none=True)
    weights = torch.randn(len(paths), generator=torch.Generator().manual_seed(0))
    (Engine(model, backend=backend).score(paths, grad=True).path_logp * weights).sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("architecture", sorted(SIZES))
def test_scores_equal_single_forward_passes(architecture):
    model, paths = tiny(architecture), questions()
    with torch.no_grad():
        truth, entropy = alone(model, paths, temperature=1.3)
    found = Engine(model).score(paths, temperature=1.3, entropy=True)
    assert (found.edge_logp - truth).abs().max() < 1e-5
    assert (found.entropy - entropy).abs().max() < 1e-4
    assert found.edge_logp.dtype == torch.float32
    ends = found.path_len.cumsum(0)
    sums = [truth[end - length : end].sum() for end, length in zip(ends.tolist(), found.path_len.tolist(), strict=True)]
    assert (found.path_logp - torch.stack(sums)).abs().max() < 1e-4
    assert torch.allclose(found.path_mean, found.path_logp / found.path_len)


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("architecture", TAKES_TREES)
def test_all_back_ends_and_budgets_agree(architecture, attention):
    model, paths = tiny(architecture, attention=attention), questions(1)
    truth = Engine(model, backend="padded").score(paths)
    for backend in ("tree", "kv", "split"):
        for budget in (8, 30, 800):
            found = Engine(model, backend=backend, budget=budget, cells=160).score(paths)
            assert (found.edge_logp - truth.edge_logp).abs().max() < 1e-5
            assert torch.equal(found.edge_path, truth.edge_path)
            assert torch.equal(found.is_greedy, truth.is_greedy)


@pytest.mark.parametrize("architecture", REFUSES_TREES)
def test_a_refused_back_end_cannot_be_forced(architecture):
    with pytest.raises(ModelError, match="cannot run packed rows"):
        Engine(tiny(architecture), backend="tree")


def test_a_model_that_makes_a_flat_mask_of_that_of_a_packed_row_is_refused(monkeypatch):
    """A mask of two dimensions says which places are padding, and lets strangers of one row see each other."""
    model, paths = copy.deepcopy(tiny("llama")), questions()
    with torch.no_grad():
        truth, _ = alone(model, paths)
    inner = model.model.forward

    def flat(*args, attention_mask=None, **more):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = torch.ones(attention_mask.shape[0], attention_mask.shape[-1], dtype=torch.long)
        return inner(*args, attention_mask=attention_mask, **more)

    monkeypatch.setattr(model.model, "forward", flat)
    assert Engine(tiny("llama")).backend == "tree"  # the verdict on its architecture, which is not one on this model
    with pytest.raises(ModelError, match="cannot run packed rows"):
        Engine(model, backend="tree")
    assert Engine(model).backend != "tree"
    assert (Engine(model).score(paths).edge_logp - truth).abs().max() < 1e-5


def test_the_best_accepted_back_end_is_taken():
    assert [Engine(tiny(name)).backend for name in ("llama", "mpt", "mamba2")] == ["tree", "kv", "padded"]


def test_flex_needs_cuda():
    with pytest.raises(ModelError, match="needs CUDA"):
        Engine(tiny("llama"), backend="flex")


def test_no_gradient_is_promised_through_a_cache():
    with pytest.raises(ModelError, match="no gradient"):
        Engine(tiny("mpt"), backend="kv").score(questions(), grad=True)
    assert Engine(tiny("mpt")).score(questions(), grad=True).path_logp.requires_grad


@pytest.mark.parametrize("order_seed", range(3))
def test_order_of_paths_changes_nothing(order_seed):
    model, paths = tiny("llama"), questions(2)
    order = list(range(len(paths)))
    random.Random(order_seed).shuffle(order)
    first, shuffled = Engine(model).score(paths), Engine(model).score(paths.select(order))
    assert (first.path_logp[order] - shuffled.path_logp).abs().max() < 1e-5
    assert torch.equal(first.path_len[order], shuffled.path_len)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_groups_of_any_number_of_unequal_completions_share_a_row_exactly(count):
    """Log-probabilities and gradient of four groups in one row, against single passes without padding or sharing."""
    model, draw = tiny("llama"), random.Random(count)
    pairs, group = [], []
    for number in range(4):
        prompt = [5, *(draw.randrange(3, 64) for _ in range(2 + 3 * number))]
        pairs += [(prompt + [draw.randrange(3, 64) for _ in range(1 + 2 * k + number % 2)], len(prompt)) for k in range(count)]
        group += [number] * count
    paths = Paths.of(pairs, group=group)
    assert len(Engine(model, backend="tree").plan(paths, grad=True)) == 1
    truth, _ = alone(model, paths)
    assert (Engine(model, backend="tree").score(paths).edge_logp - truth.detach()).abs().max() < 1e-5
    weights = torch.randn(len(paths), generator=torch.Generator().manual_seed(0))
    packed = gradient(model, paths, "tree")
    model.zero_grad(set_to_none=True)
    (
        torch.stack([part.sum() for part in truth.split([len(ids) - start for ids, start in zip(paths.ids, paths.start, strict=True)])]) * weights
    ).sum().backward()
    assert relative(packed, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_gradients_equal_those_of_padded_rows(architecture, tied):
    model, paths = tiny(architecture, tie_word_embeddings=tied), questions(3)
    assert relative(gradient(model, paths, "tree"), gradient(model, paths, "padded")) < 1e-5
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5.23 by the old name
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora_gradients_equal_those_of_padded_rows_and_leave_the_rest_alone(targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    paths = questions(4)
    with torch.no_grad():
        truth, _ = alone(model, paths)
    assert (Engine(model).score(paths).edge_logp - truth).abs().max() < 1e-5
    assert relative(gradient(model, paths, "tree"), gradient(model, paths, "padded")) < 1e-5
    assert {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.grad is not None} == {"default"}
    with model.disable_adapter():
        assert (Engine(model).score(paths).edge_logp - truth).abs().max() > 1e-3


def test_a_loss_per_row_gives_the_gradient_of_the_whole_loss():
    model, paths = tiny("llama"), questions(5)
    weights = torch.randn(len(paths), generator=torch.Generator().manual_seed(0))
    whole = gradient(model, paths, "tree")
    model.zero_grad(set_to_none=True)
    rows = 0
    for chosen, scores in Engine(model, budget=30).stream(paths, grad=True):
        (scores.path_logp * weights[chosen]).sum().backward()
        rows += 1
    assert rows > 1
    assert relative(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), whole) < 1e-5


def test_the_stream_leaves_the_callers_gradient_mode_alone():
    for _, scores in Engine(tiny("llama")).stream(questions()):
        assert torch.is_grad_enabled()
        assert not scores.path_logp.requires_grad


def test_a_token_changed_in_one_path_changes_no_bit_of_another():
    model = tiny("llama")
    paths = Paths([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 13], [5, 6, 20, 21]], [2] * 3, [0] * 3)
    other = Paths([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 40, 13], [5, 6, 20, 21]], [2] * 3, [0] * 3)
    before, after = (Engine(model, backend="tree").score(some) for some in (paths, other))
    assert torch.equal(before.path_logp[[0, 2]], after.path_logp[[0, 2]])
    assert before.path_logp[1] != after.path_logp[1]


@pytest.mark.parametrize("architecture", TAKES_TREES)
@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_a_token_changed_in_one_group_changes_no_bit_of_another_in_the_row(architecture, where):
    model = tiny(architecture)
    groups = [[[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12]], [[21, 22, 23, 24, 25, 26], [21, 22, 23, 27, 28]], [[31, 32, 33, 34, 35, 36], [31, 32, 33, 37, 38]]]
    changed = copy.deepcopy(groups)
    for path in changed[1] if where == "prompt" else changed[1][:1]:
        path[1 if where == "prompt" else 4] = 50
    paths, other = (Paths([ids for group in some for ids in group], [3] * 6, [0, 0, 1, 1, 2, 2]) for some in (groups, changed))
    engine = Engine(model, backend="tree")
    (row,) = engine.plan(paths)
    assert row.paths == list(range(6))
    before, after = (engine.score(some).path_logp for some in (paths, other))
    assert torch.equal(before[[0, 1, 4, 5]], after[[0, 1, 4, 5]])
    assert before[2] != after[2]
    assert (before[3] != after[3]) == (where == "prompt")


@pytest.mark.parametrize("backend", ["tree", "kv", "padded"])
@pytest.mark.parametrize("at", ["leaf", "prompt_end", "scored", "before"])
def test_hidden_states_equal_those_of_single_passes(backend, at):
    model, paths = tiny("gemma2"), questions(6)
    found = Engine(model, backend=backend, budget=40).score(paths, hidden={"layers": [0, "last"], "at": at}).hidden
    first, last = [], []
    for ids, start in zip(paths.ids, paths.start, strict=True):
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        where = {"leaf": slice(-1, None), "prompt_end": slice(start - 1, start), "scored": slice(start, None), "before": slice(start - 1, -1)}[at]
        first.append(states[1][0, where])
        last.append(states[-1][0, where])
    assert (found[0] - torch.cat(first)).abs().max() < 1e-4
    assert (found["last"] - torch.cat(last)).abs().max() < 1e-4


def test_states_of_prompts_can_be_asked_for_without_scoring_anything():
    model = tiny("llama")
    found = Engine(model).score(Paths([[5, 6, 7], [5, 6, 8, 9]], [3, 4]), hidden={"layers": [-1], "at": "leaf"}, grad=True)
    assert found.hidden[-1].shape == (2, 32)
    assert found.hidden[-1].requires_grad
    assert found.path_len.tolist() == [0, 0]
    assert found.path_mean.tolist() == [0.0, 0.0]


def test_greedy_means_every_token_is_the_likeliest():
    model = tiny("llama")
    ids = [5, 6, 7]
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 128]
    assert Engine(model).score(Paths([ids, other], [3, 3])).is_greedy.tolist() == [True, False]


def test_scaled_and_capped_logits_are_honoured():
    paths = questions(7)
    model = tiny("gemma2", final_logit_softcapping=2.0)
    with torch.no_grad():
        truth, _ = alone(model, paths)
    assert (Engine(model).score(paths).edge_logp - truth).abs().max() < 1e-5


def test_a_path_beyond_an_unchecked_window_is_not_packed():
    model = tiny("mistral", sliding_window=513, max_position_embeddings=1024)
    long = [3 + token % 60 for token in range(530)]
    paths = Paths([[*long, 7, 8], [*long, 9, 10]], [530] * 2, [0, 0])
    assert {row.form for row in Engine(model).plan(paths)} == {"padded"}
    with pytest.raises(ModelError, match="window of 513"):
        Engine(model, backend="tree").score(paths)


def test_dropout_never_acts():
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    first, second = (Engine(model).score(questions(), grad=True).path_logp for _ in range(2))
    assert torch.equal(first, second)
    assert not model.training


def test_nothing_in_gives_nothing_out():
    found = Engine(tiny("llama")).score(Paths([], []), hidden={"layers": "last"}, entropy=True)
    assert (len(found.edge_logp), len(found.path_logp), len(found.entropy), found.hidden["last"].shape) == (0, 0, 0, (0, 32))


def test_bad_requests_say_what_is_wrong():
    model = tiny("llama")
    engine, paths = Engine(model), Paths([[5, 6, 7]], [1])
    with pytest.raises(DataError, match="outside the vocabulary of 128"):
        engine.score(Paths([[5, 6, 500]], [1]))
    with pytest.raises(DataError, match="no layer 2"):
        engine.score(paths, hidden={"layers": [2]})
    with pytest.raises(DataError, match="cannot be asked for"):
        engine.score(paths, hidden={"at": "root"})
    with pytest.raises(DataError, match="temperature of 0"):
        engine.score(paths, temperature=0.0)
    with pytest.raises(ModelError, match="no back end 'magic'"):
        Engine(model, backend="magic")
    with pytest.raises(ModelError, match="not a transformers model"):
        Engine(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no language-model head"):
        Engine(model.model)


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoModelForCausalLM

    from fiducial.models.embedded import folder

    return AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def exact(smollm2):
    """The same in float64, with some paths and their log-probabilities by single passes."""
    model, paths = copy.deepcopy(smollm2).double(), questions(9, groups=2)
    with torch.no_grad():
        return model, paths, alone(model, paths)[0]


@pytest.mark.smollm2
def test_shared_rows_of_the_embedded_model_equal_single_passes(smollm2):
    paths = questions(9, groups=2)
    with torch.no_grad():
        truth, _ = alone(smollm2, paths)
    found = Engine(smollm2).score(paths)
    assert Engine(smollm2).backend == "tree"
    assert (found.edge_logp - truth).abs().max() < 1e-4
    sums = torch.stack([part.sum() for part in truth.split(found.path_len.tolist())])
    assert ((found.path_logp - sums).abs() < 1e-4 * (1 + found.path_len / 10)).all()


SETTINGS = [{"backend": name, "budget": budget} for name in ("tree", "split") for budget in (8, 40, 800)] + [{"backend": "kv"}, {"backend": "padded"}]


@pytest.mark.smollm2
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda how: "-".join(map(str, how.values())))
def test_every_back_end_and_budget_gives_the_embedded_models_single_passes_in_float64(exact, settings):
    model, paths, truth = exact
    assert (Engine(model, **settings).score(paths).edge_logp - truth).abs().max() < 1e-9


@pytest.mark.smollm2
@pytest.mark.parametrize("moved", ["groups", "paths", "both"])
def test_the_order_of_groups_and_of_paths_changes_nothing_about_the_embedded_model_in_float64(exact, moved):
    model, paths, truth = exact
    draw, half = random.Random(0), len(paths) // 2
    groups = [list(range(half)), list(range(half, 2 * half))]
    order = draw.sample(range(2 * half), 2 * half) if moved == "both" else [i for group in groups for i in draw.sample(group, half)]
    order = groups[1] + groups[0] if moved == "groups" else order
    found = Engine(model, backend="tree").score(paths.select(order))
    spans = paths.spans()
    assert (found.edge_logp - truth[[e for i in order for e in spans[i]]]).abs().max() < 1e-9


@pytest.mark.smollm2
def test_gradients_of_the_embedded_model_equal_those_of_padded_rows(smollm2):
    paths = questions(9, groups=2)
    assert relative(gradient(smollm2, paths, "tree"), gradient(smollm2, paths, "padded")) < 1e-5
    smollm2.zero_grad(set_to_none=True)


@pytest.mark.smollm2
def test_gradients_of_an_adapter_on_the_embedded_model_equal_those_of_padded_rows(smollm2):
    adapted = lora.attach(copy.deepcopy(smollm2), rank=4)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=draw)
    paths = questions(9, groups=2)
    assert relative(gradient(adapted, paths, "tree"), gradient(adapted, paths, "padded")) < 1e-5


@pytest.mark.smollm2
def test_a_changed_token_of_the_embedded_model_changes_no_other_path_by_a_bit(smollm2):
    # ordinary tokens: the reserved ones at the beginning of this vocabulary were never trained, and are nearly alike
    first, second, third = ([504, 3575, 282, 260, *answer] for answer in ([5007, 2213, 30], [1206, 759, 411], [1206, 6968, 411]))
    before, after = (Engine(smollm2, backend="tree").score(Paths.of([(first, 4), (other, 4)], group=[0, 0])) for other in (second, third))
    assert torch.equal(before.edge_logp[:3], after.edge_logp[:3])
    assert not torch.equal(before.edge_logp[3:], after.edge_logp[3:])


def test_a_window_by_row_index_bounds_shared_rows_and_not_the_numbers():
    model = tiny("gpt_neo")  # its window of 64 counts rows, and the tree of 12 + 30 * 6 = 192 nodes would pass it
    draw = random.Random(0)
    start = [draw.randrange(3, 64) for _ in range(12)]
    paths = Paths.of([([*start, number, *(draw.randrange(3, 64) for _ in range(6))], 12) for number in range(30)], group=[0] * 30)
    with torch.no_grad():
        truth, _ = alone(model, paths)
    for engine in (Engine(model), Engine(model, backend="kv")):
        assert all(len(row.ids) <= 64 for row in engine.plan(paths) if row.form == "tree")
        assert (engine.score(paths).edge_logp - truth).abs().max() < 1e-5
    assert any(row.form == "tree" for row in Engine(model).plan(paths))


def test_a_tree_that_cannot_be_cut_below_the_window_is_padded_or_refused():
    model = tiny("gpt_neo")
    long = [3 + token % 60 for token in range(90)]
    paths = Paths([[*long, 7, 8], [*long, 9, 10]], [90] * 2, [0, 0])
    with torch.no_grad():
        truth, _ = alone(model, paths)
    assert (Engine(model).score(paths).edge_logp - truth).abs().max() < 1e-5
    with pytest.raises(ModelError, match="window of 64"):
        Engine(model, backend="kv").plan(paths)


@pytest.mark.parametrize("backend", ["auto", "tree", "kv", "padded"])
def test_paths_on_both_sides_of_the_rotary_turning_point_never_share_a_row(backend):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "original_max_position_embeddings": 32}
    model = tiny("llama", rope_parameters=rope | {"factor": 4.0})
    start = [3 + token % 60 for token in range(25)]
    paths = Paths([start + list(range(5, 5 + more)) for more in (3, 20, 5, 18, 30)], [25] * 5, [0] * 5)
    with torch.no_grad():
        truth, _ = alone(model, paths)
    engine = Engine(model, backend=backend)
    assert (engine.score(paths).edge_logp - truth).abs().max() < 1e-5
    assert sorted(index for row in engine.plan(paths) for index in row.paths) == list(range(5))


def test_positions_that_depend_on_earlier_calls_are_refused():
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, max_position_embeddings=64)
    assert len(Engine(model).score(Paths([[5] * 60], [59])).edge_logp) == 1
    with pytest.raises(ModelError, match="beyond 64 tokens"):
        Engine(model).score(Paths([[5] * 70], [69]))


def test_states_of_scored_tokens_are_in_order_also_when_there_are_as_many_as_paths():
    model = tiny("llama")
    paths = Paths([[5, 6], [5, 6, 7, 8], [5, 6, 9]], [2, 2, 2])  # 0 + 2 + 1 scored tokens, 3 paths
    found = Engine(model, backend="padded", budget=1).score(paths, hidden={"layers": ["last"], "at": "scored"}).hidden["last"]
    wanted = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, 2:] for ids in paths.ids]
    assert (found - torch.cat(wanted)).abs().max() < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_text_longer_than_the_model_reads_is_refused_and_its_last_token_may_be_beyond(architecture):
    engine = Engine(tiny(architecture))
    assert engine.score(Paths([[5] * 513], [511])).path_len.tolist() == [2]
    with pytest.raises(DataError, match="513 tokens is longer than the 512"):
        engine.score(Paths([[5] * 514], [511]))
