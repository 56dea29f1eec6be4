"""The training loop on a tiny model: the same gradient however a step is cut up, exact resumption, honest stops."""

import math
import time

import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.align.kto import KTO
from fiducial.align.sft import SFT
from fiducial.core.errors import ConfigError, DataError, FiducialError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.models.forest import Paths
from fiducial.models.scripted import tiny
from fiducial.training import checkpoint, loop, lora, updates
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions
from fiducial.training.row_passes import RowPasses

LORA, FULL = 4, 0
OPTIONS = TrainOptions(batch=8, learning_rate=1e-2, lora_rank=LORA, warmup=0.0, clip=1e9)


def options(**changes):
    return OPTIONS.model_copy(update=changes)


def weights(model):
    head = {"head": model.head.weight.detach().clone()} if model.head else {}
    return {n: p.detach().clone() for n, p in model.module.named_parameters()} | head


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def gradient(model, groups, objective, tmp_path, **changes):
    """Gradient of one whole step, and the step's loss; adapters are given a start at which both matrices get one."""
    tmp_path.mkdir(exist_ok=True)
    chosen = options(**changes)
    if chosen.lora_rank:
        model.module = lora.attach(model.module, rank=chosen.lora_rank)
        for n, p in model.module.named_parameters():
            if "lora_B" in n:
                p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    kept = {}
    publish = updates.Trainables.publish

    def keep(self):
        kept.update({n: m.grad.clone() for n, m in self.masters.items() if m.grad is not None})
        publish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates.Trainables, "publish", keep)
        result = train(model, groups, objective, chosen, folder=tmp_path)
    assert result.steps == 1
    return kept, result


def distance(one, other):
    """Relative difference of two gradients as whole vectors."""
    assert one.keys() == other.keys()
    a, b = (torch.cat([g[n].flatten().double() for n in sorted(g)]) for g in (one, other))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("rank", [LORA, FULL], ids=["lora", "full"])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut_into_rows(made, tmp_path, objective, rank):
    found = {budget: gradient(made.budgeted(budget), made.pairs(), objective, tmp_path / str(budget), lora_rank=rank) for budget in (2000, 256, 64)}
    one_row, result = found.pop(2000)
    for kept, other in found.values():
        assert distance(kept, one_row) < 1e-5
        assert other.history[0]["loss"] == pytest.approx(result.history[0]["loss"], rel=1e-5)


def test_a_group_larger_than_a_row_takes_two_passes_to_the_same_gradient(made, tmp_path, objective, monkeypatch):
    one_row, result = gradient(made.budgeted(2000), made.pairs(3), objective, tmp_path / "a")
    took, two_passes = [], RowPasses._two_passes
    monkeypatch.setattr(RowPasses, "_two_passes", lambda *args: (took.append(True), two_passes(*args))[1])
    two, again = gradient(made.budgeted(30, backend="split"), made.pairs(3), objective, tmp_path / "b")
    assert bool(took) == (len(objective.prepare(made.group(0)).completions) > 1)
    assert distance(two, one_row) < 1e-5
    assert again.history[0]["loss"] == pytest.approx(result.history[0]["loss"], rel=1e-5)
    assert again.tokens > result.tokens  # the prompt is repeated in every row


def test_the_step_is_the_sum_of_token_losses_over_all_tokens(made, tmp_path):
    """Gradient of sum(nll) / sum(tokens) over the step, worked with the plain model; shorter groups must not count more."""
    groups = made.pairs(4)
    kept, result = gradient(tiny(), groups, SFT(), tmp_path, lora_rank=FULL)
    plain = tiny()
    total, tokens = torch.zeros(()), 0
    for g in groups:
        ids, start = plain.encode(g.prompt.messages, g.completions[0].text)
        logp = plain.module(torch.tensor([ids])).logits[0].log_softmax(-1)
        total = total - sum(logp[i - 1, ids[i]] for i in range(start, len(ids)))
        tokens += len(ids) - start
    (total / tokens).backward()
    assert result.history[0]["loss"] == pytest.approx(float((total / tokens).detach()), rel=1e-5)
    assert distance(kept, {n: p.grad for n, p in plain.module.named_parameters() if p.grad is not None}) < 1e-5


@pytest.mark.parametrize("rank", [LORA, FULL], ids=["lora", "full"])
def test_demonstrations_packed_into_one_row_teach_what_separate_ones_do(made, tmp_path, rank):
    """No document sees another: eight in one row of 2000 tokens against each on its own, unpadded."""
    groups = [g.model_copy(update={"completions": g.completions[:1]}) for g in made.pairs()]
    packed, separate = made.budgeted(2000), made.budgeted(1)
    rows = [m.engine.plan(Paths.of([m.encode(g.prompt.messages, g.completions[0].text) for g in groups]), grad=True) for m in (packed, separate)]
    assert [len(r) for r in rows] == [1, 8]
    (one, result), (other, again) = (gradient(m, groups, SFT(), tmp_path / str(i), lora_rank=rank) for i, m in enumerate((packed, separate)))
    assert distance(one, other) < 1e-5
    assert result.history[0]["loss"] == pytest.approx(again.history[0]["loss"], rel=1e-6)


def test_a_group_of_weight_two_counts_as_two(made, tmp_path):
    a, b = made.group(1), made.group(2)
    twice, _ = gradient(tiny(), [a.model_copy(update={"weight": 2.0}), b], DPO(), tmp_path / "a")
    listed, _ = gradient(tiny(), [a, b, a], DPO(), tmp_path / "b")
    assert distance(twice, listed) < 1e-5


def test_groups_of_no_weight_teach_nothing_and_are_no_error(made, tmp_path):
    model = tiny()
    result = train(model, [g.model_copy(update={"weight": 0.0}) for g in made.pairs(2)], SFT(), options(), folder=tmp_path)
    assert result.history[0]["loss"] == result.history[0]["grad_norm"] == 0.0


@pytest.mark.parametrize("rank", [LORA, FULL], ids=["lora", "full"])
def test_the_reference_is_the_policy_before_the_first_step(made, tmp_path, rank):
    result = train(tiny(), made.pairs(), DPO(), options(lora_rank=rank), folder=tmp_path)
    first = result.history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["chosen_ratio"]) < 1e-4
    assert abs(first["rejected_ratio"]) < 1e-4


@pytest.mark.parametrize("rank", [LORA, FULL], ids=["lora", "full"])
def test_mismatched_pairs_are_where_the_reference_is_before_the_first_step_and_leave_it(made, tmp_path, rank):
    result = train(tiny(), made.pairs(), KTO(beta=0.5), options(lora_rank=rank, epochs=3), folder=tmp_path)
    first, last = result.history[0], result.history[-1]
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["reference_point"] < 1e-4
    assert last["chosen_ratio"] > last["rejected_ratio"] + 1.0


@pytest.mark.parametrize("objective", [DPO(), KTO(beta=0.5)], ids=["dpo", "kto"])
def test_the_reference_of_a_model_with_an_adapter_is_that_model_and_not_the_one_below(made, tmp_path, objective):
    model = tiny()
    train(model, made.pairs(), SFT(), options(epochs=5), folder=tmp_path / "first")
    first = train(model, made.pairs(), objective, options(), folder=tmp_path / "second").history[0]
    assert abs(first["chosen_ratio"]) < 1e-4
    assert first["loss"] == pytest.approx(math.log(2) if isinstance(objective, DPO) else 0.5, abs=1e-5)


def test_training_with_a_reference_is_not_taken_up_from_an_adapter_that_has_moved(made, tmp_path):
    model = tiny()
    train(model, made.pairs(), SFT(), options(), folder=tmp_path / "first")
    train(model, made.pairs(), DPO(), options(), folder=tmp_path / "second")
    with pytest.raises(DataError, match="another model"):
        train(model, made.pairs(), DPO(), options(), folder=tmp_path / "second")


@pytest.mark.parametrize("apart", [0.01, float("nan")])
def test_a_policy_that_does_not_begin_at_its_reference_is_refused_and_stays_as_it_was(made, tmp_path, monkeypatch, apart):
    """A loss shows nothing of it: dropout that is on, a changed template, a table of another model."""
    right = loop._reference
    monkeypatch.setattr(loop, "_reference", lambda *args: (found := right(*args)).with_logp(found.logp + apart * found.length))
    model = tiny()
    before = weights(model)
    with pytest.raises(FiducialError, match="before the first update"):
        train(model, made.pairs(), DPO(), options(lora_rank=FULL), folder=tmp_path)
    assert same(weights(model), before)


def test_the_reference_stays_where_it_was_while_the_policy_moves(made, tmp_path):
    result = train(tiny(), made.pairs(), DPO(beta=1.0), options(epochs=10, batch=8), folder=tmp_path)
    assert result.history[-1]["loss"] < 0.5 * math.log(2)
    assert result.history[-1]["accuracy"] == 1.0


def test_the_same_object_goes_on_after_an_interruption_too(made, tmp_path):
    asked = options(epochs=2, batch=4, save_every=1)
    straight, model = tiny(), tiny()
    train(straight, made.pairs(), DPO(), asked, folder=tmp_path / "a")

    def interrupt(step, steps, figures):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, made.pairs(), DPO(), asked, folder=tmp_path / "b", report=interrupt)
    train(model, made.pairs(), DPO(), asked, folder=tmp_path / "b")
    assert same(weights(model), weights(straight))


def test_a_finished_training_called_again_changes_nothing(made, tmp_path):
    model, again = tiny(), tiny()
    first = train(model, made.pairs(), SFT(), options(), folder=tmp_path)
    second = train(again, made.pairs(), SFT(), options(), folder=tmp_path, report=lambda *_: pytest.fail("a step was made"))
    assert same(weights(model), weights(again))
    assert second.history == first.history


@pytest.mark.parametrize("changes", [{"batch": 4}, {"learning_rate": 1e-3}, {"seed": 1}, {"epochs": 2}])
def test_a_checkpoint_of_other_options_is_refused(made, tmp_path, changes):
    train(tiny(), made.pairs(), SFT(), options(), folder=tmp_path)
    with pytest.raises(DataError, match="other data or options"):
        train(tiny(), made.pairs(), SFT(), options(**changes), folder=tmp_path)


def test_a_checkpoint_of_other_data_or_another_objective_is_refused(made, tmp_path):
    train(tiny(), made.pairs(), DPO(), options(), folder=tmp_path)
    for groups, objective in ((made.pairs(7), DPO()), (made.pairs(), DPO(beta=0.2)), (made.pairs(), SFT())):
        with pytest.raises(DataError, match="other data or options"):
            train(tiny(), groups, objective, options(), folder=tmp_path)


def test_an_adapter_checkpoint_is_refused_on_another_model_of_the_same_shape(made, tmp_path):
    train(tiny(seed=0), made.pairs(), SFT(), options(), folder=tmp_path)
    with pytest.raises(DataError, match="another model"):
        train(tiny(seed=1), made.pairs(), SFT(), options(), folder=tmp_path)


def test_full_training_with_a_reference_is_not_taken_up_from_a_model_that_has_moved(made, tmp_path):
    asked = options(lora_rank=FULL, epochs=2)
    model = tiny()
    train(model, made.pairs(), DPO(), asked, folder=tmp_path)
    with pytest.raises(DataError, match="another model"):
        train(model, made.pairs(), DPO(), asked, folder=tmp_path)


def test_full_training_moves_bfloat16_weights_at_a_rate_that_rounds_away(made, tmp_path):
    model = tiny()
    model.module = model.module.bfloat16()
    before = weights(model)
    asked = options(lora_rank=FULL, learning_rate=2e-5, epochs=15, batch=8)
    train(model, made.pairs(), SFT(), asked, folder=tmp_path)
    after = weights(model)
    assert {p.dtype for p in after.values()} == {torch.bfloat16}
    moved = sum(int((before[n] != after[n]).sum()) for n in before) / sum(p.numel() for p in before.values())
    # 15 steps of Adam at 2e-5, falling, move a weight by some 1.5e-4; weights are about 0.2, where bfloat16 steps are 1e-3
    assert moved > 0.1
    plain = before["model.embed_tokens.weight"]
    assert torch.equal(plain.abs().clamp(min=0.1) + 2e-5, plain.abs().clamp(min=0.1))  # one step alone would have been lost


def test_groups_longer_than_the_limit_are_left_out_whole_and_counted(made, tmp_path):
    long = made.group(3, "short", "x" * 200)
    result = train(tiny(), [*made.pairs(3), long], DPO(), options(max_length=100), folder=tmp_path / "a")
    assert (result.groups, result.left_out) == (3, 1)
    result = train(tiny(), [*made.pairs(3), long], SFT(), options(max_length=100), folder=tmp_path / "b")
    assert (result.groups, result.left_out) == (4, 0)  # nothing is learnt from the long one
    result = train(tiny(), [*made.pairs(3), made.group(3, "x" * 200)], SFT(), options(max_length=100), folder=tmp_path / "c")
    assert (result.groups, result.left_out) == (3, 1)


def test_demonstrations_are_trained_on_without_what_was_not_preferred(made, tmp_path):
    model = tiny()
    second = made.group(1, "no", "yes, gladly", targets=(0.0, 1.0))
    both = made.group(2, "a", "bc", targets=(0.5, 0.5))
    lengths = [len(model.encode(g.prompt.messages, t)[0]) for g, t in ((second, "yes, gladly"), (both, "a"), (both, "bc"))]
    assert train(model, [second, both], SFT(), options(), folder=tmp_path).naive_tokens == sum(lengths)


def test_groups_without_completions_or_with_an_empty_cut_one_are_left_out(made, tmp_path):
    none = Group(prompt=Prompt(messages=user("a")), completions=())
    empty = Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="", finish="length"),))
    result = train(tiny(), [none, empty, *made.pairs(2)], SFT(), options(), folder=tmp_path)
    assert (result.groups, result.left_out) == (2, 2)


def test_single_demonstrations_are_left_out_of_preference_training_and_counted(made, tmp_path):
    single = made.group(4, "no")
    result = train(tiny(), [*made.pairs(3), single], DPO(), options(), folder=tmp_path)
    assert (result.groups, result.left_out) == (3, 1)
    with pytest.raises(DataError, match="none of 1 groups") as caught:
        train(tiny(), [single], DPO(), options(), folder=tmp_path / "b")
    assert "2 completions or more" in caught.value.hint


def test_a_completion_that_was_cut_off_is_not_taught_to_end(made, tmp_path):
    """One token less is trained on: the end."""
    model = tiny()
    whole = Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="abc"),))
    cut = whole.model_copy(update={"completions": (Completion(text="abc", finish="length"),)})
    sizes = [train(tiny(), [g], SFT(), options(), folder=tmp_path / g.id).naive_tokens for g in (whole, cut)]
    assert sizes[0] == sizes[1] + 1 == len(model.encode(user("a"), "abc")[0])


def test_nothing_to_train_on_is_a_data_error(made, tmp_path):
    with pytest.raises(DataError, match="none of 8 groups"):
        train(tiny(), made.pairs(), SFT(), options(max_length=5), folder=tmp_path)
    with pytest.raises(DataError, match="none of 0 groups"):
        train(tiny(), [], SFT(), options(), folder=tmp_path)


def test_a_loss_that_is_no_number_names_the_groups_and_leaves_the_model_as_it_was(made, tmp_path):
    model = tiny()
    with torch.no_grad():
        model.module.model.norm.weight[0] = float("nan")
    groups = made.pairs(2)
    with pytest.raises(FiducialError, match="no longer a number at step 1") as caught:
        train(model, groups, SFT(), options(), folder=tmp_path)
    assert all(g.id in caught.value.message for g in groups)
    assert all((p == 0).all() for n, p in model.module.named_parameters() if "lora_B" in n)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_time_budget_stops_with_a_reason_and_more_time_goes_on(made, tmp_path):
    asked = options(epochs=5, batch=8, minutes=1e-9)
    first = train(tiny(), made.pairs(), SFT(), asked, folder=tmp_path)
    assert (first.steps, first.planned) == (1, 5)
    assert "budget" in first.stop
    again = train(tiny(), made.pairs(), SFT(), asked, folder=tmp_path)
    assert (again.steps, again.stop) == (1, first.stop)  # spent is spent
    more = train(tiny(), made.pairs(), SFT(), asked.model_copy(update={"minutes": 10.0}), folder=tmp_path)
    assert (more.steps, more.stop) == (5, "")


def test_a_schedule_that_does_not_fit_is_shortened_and_its_rate_still_falls_to_zero(made, tmp_path, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))  # a step takes a second
    asked = options(epochs=40, batch=8, minutes=21 / 60, learning_rate=1e-3)  # a second passes before the first
    whole = train(tiny(), made.pairs(), SFT(), asked.model_copy(update={"minutes": 1.0}), folder=tmp_path / "whole")
    assert (whole.steps, whole.planned, whole.stop) == (40, 40, "")
    short = train(tiny(), made.pairs(), SFT(), asked, folder=tmp_path / "short")
    assert (short.steps, short.planned) == (20, 40)
    assert "shortened to 20 of 40 steps" in short.stop
    rates = [h["learning_rate"] for h in short.history]
    assert rates[-1] < 0.02 * max(rates)
    again = train(tiny(), made.pairs(), SFT(), asked, folder=tmp_path / "short")
    assert (again.steps, again.stop) == (20, short.stop)
    more = train(tiny(), made.pairs(), SFT(), asked.model_copy(update={"minutes": 1.0}), folder=tmp_path / "short")
    assert (more.steps, more.stop) == (40, "")


def test_a_shortened_schedule_is_kept_at_once_for_who_goes_on_after_a_kill(made, tmp_path, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    asked = options(epochs=40, batch=8, minutes=21 / 60, save_every=1000)  # a second passes before the first
    saved, save = {}, checkpoint.save

    def noted(folder, **given):
        save(folder, **given)
        saved[given["step"]] = given["state"]["last"][0]
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", noted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), made.pairs(), SFT(), asked, folder=tmp_path)
    (at,) = saved
    assert at < saved[at] == 20
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # nothing takes time any more, and yet
    assert train(tiny(), made.pairs(), SFT(), asked, folder=tmp_path).steps == 20


def test_slow_first_steps_do_not_shorten_a_schedule_that_fits(made, tmp_path, monkeypatch):
    now = [0.0]

    def clock():  # read before and after each step: the first five take two seconds, the others one
        now[0] += 2.0 if now[0] < 20 else 1.0
        return now[0]

    monkeypatch.setattr(time, "monotonic", clock)
    result = train(tiny(), made.pairs(), SFT(), options(epochs=40, batch=8, minutes=51 / 60), folder=tmp_path)
    assert (result.steps, result.stop) == (40, "")


def test_a_watch_that_objects_stops_and_is_not_overruled_by_a_resumption(made, tmp_path):
    calls = []

    def watch(step, model):
        calls.append(step)
        return {"k3": 0.5 * step}, "drift: too far" if step == 4 else ""

    asked = options(epochs=8, batch=8, watch_every=2)
    first = train(tiny(), made.pairs(), SFT(), asked, folder=tmp_path, watch=watch)
    assert (first.steps, first.stop, calls) == (4, "drift: too far", [2, 4])
    assert [w["k3"] for w in first.watched] == [1.0, 2.0]
    again = train(tiny(), made.pairs(), SFT(), asked, folder=tmp_path, watch=watch)
    assert (again.steps, again.stop, calls) == (4, "drift: too far", [2, 4])


def test_the_end_is_watched_also_when_time_is_up(made, tmp_path):
    result = train(tiny(), made.pairs(), SFT(), options(epochs=5, minutes=1e-9), folder=tmp_path, watch=lambda step, model: ({"k3": 0.0}, ""))
    assert result.watched == [{"step": 1, "k3": 0.0}]


def test_a_gradient_far_above_its_median_stops(made, tmp_path, monkeypatch):
    norms = iter([1.0] * 12 + [101.0])
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: next(norms))
    result = train(tiny(), made.pairs(), SFT(), options(epochs=20), folder=tmp_path)
    assert result.steps == 13
    assert "over 100 times its median" in result.stop


def test_the_first_gradient_after_steps_without_one_does_not_stop(made, tmp_path, monkeypatch):
    norms = iter([0.0] * 12 + [0.5] + [0.0] * 7)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: next(norms))
    result = train(tiny(), made.pairs(), SFT(), options(epochs=20), folder=tmp_path)
    assert (result.steps, result.stop) == (20, "")


def test_a_part_of_a_pass_is_not_a_step_too_long():
    """1.1 times 100 is 110.00000000000001 in floating point."""
    asked = options(epochs=1.1, batch=1)
    assert loop.planned_steps(100, asked) == 110
    assert loop.batch(110, 100, asked) == []
    assert loop.planned_steps(7, options(epochs=1.5, batch=4)) == 3  # 11 groups


def test_every_group_is_seen_once_per_pass_in_an_order_that_the_seed_decides():
    def order(seed):
        seen = []
        asked = options(epochs=2, batch=3, seed=seed)
        for step in range(loop.planned_steps(7, asked)):
            seen += loop.batch(step, 7, asked)
        return seen

    first = order(0)
    assert sorted(first[:7]) == sorted(first[7:]) == list(range(7))
    assert first[:7] != first[7:]
    assert order(0) == first != order(1)


def test_the_rate_rises_and_falls_along_a_cosine(made, tmp_path):
    result = train(tiny(), made.pairs(8), SFT(), options(epochs=10, warmup=0.2, learning_rate=1.0e-3), folder=tmp_path)
    rates = [h["learning_rate"] for h in result.history]
    assert rates[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert rates[6] == pytest.approx(0.5e-3)  # half-way down: 4 of 8
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)


def test_without_a_rate_an_adapter_learns_at_ten_times_the_objectives(made, tmp_path):
    plain = TrainOptions(batch=8, warmup=0.0)
    assert train(tiny(), made.pairs(), DPO(), plain, folder=tmp_path / "a").history[0]["learning_rate"] == pytest.approx(1e-5)
    full = plain.model_copy(update={"lora_rank": 0})
    assert train(tiny(), made.pairs(), SFT(), full, folder=tmp_path / "b").history[0]["learning_rate"] == pytest.approx(2e-5)


def test_shared_prompts_are_counted_once_and_naively(made, tmp_path):
    groups = made.pairs(2)
    model = tiny()
    lengths = [[len(model.encode(g.prompt.messages, c.text)[0]) for c in g.completions] for g in groups]
    result = train(model, groups, DPO(), options(), folder=tmp_path)
    assert result.naive_tokens == sum(map(sum, lengths))
    assert result.tokens < result.naive_tokens


@pytest.mark.parametrize("rank", [0, 64])
def test_a_rank_that_was_set_and_is_not_that_of_the_models_adapter_is_an_error(made, tmp_path, rank):
    model = tiny()
    model.module = lora.attach(model.module, rank=2)
    with pytest.raises(ConfigError, match=f"adapter of rank 2, .* lora_rank {rank} would be ignored"):
        train(model, made.pairs(), SFT(), TrainOptions(lora_rank=rank), folder=tmp_path)
    assert train(model, made.pairs(), SFT(), TrainOptions(lora_rank=2, lora_depth=0.5), folder=tmp_path / "same").steps
    assert train(model, made.pairs(), SFT(), TrainOptions(), folder=tmp_path / "unset").steps


def test_a_float16_model_is_refused_before_anything_is_computed(made, tmp_path):
    model = tiny()
    model.module.half()
    with pytest.raises(ConfigError, match="bfloat16"):
        train(model, made.pairs(), SFT(), options(), folder=tmp_path)
    assert not list(tmp_path.iterdir())
