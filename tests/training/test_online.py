"""Learning from one's own samples, on a tiny model."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from fiducial.align.dpo import DPO
from fiducial.align.exo import EXO
from fiducial.align.grpo import GRPO
from fiducial.align.ppo import PPO
from fiducial.align.rloo import RLOO
from fiducial.align.rwr import RWR
from fiducial.align.sft import SFT
from fiducial.align.unlikelihood import Unlikelihood
from fiducial.core.errors import ConfigError, DataError
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.core.roles import Reward
from fiducial.models.scripted import tiny
from fiducial.training.constraint import Multiplier
from fiducial.training.online import learn
from fiducial.training.online_options import OnlineOptions
from fiducial.training.online_task import Task, spread
from fiducial.training.options import TrainOptions
from fiducial.training.policy_gradient import SampledObjective
from fiducial.training.rewards import Mixture, Part

PROMPTS = [Prompt(messages=user(text)) for text in ("hello", "why is the sky blue?", "tell me", "what now")]
ONLINE = OnlineOptions(k=4, max_tokens=6, kl_budget=1e9, length_change=None)
OPTIONS = TrainOptions(batch=4, learning_rate=1e-2, lora_rank=4, epochs=3)


class Counts(Reward):
    """How many of its letters an answer has."""

    def __init__(self, letters="aeiou", label="counts", sign=1.0):
        self.letters, self.label, self.sign = letters, label, sign

    @property
    def name(self):
        return f"test/{self.label}"

    def options(self):
        return {"letters": self.letters, "sign": self.sign}

    def score(self, groups):
        return [tuple(self.sign * sum(c in self.letters for c in each.text) for each in g.completions) for g in groups]


class Silent(Counts):
    """Says nothing of answers that begin with one of its letters."""

    def score(self, groups):
        return [tuple(None if c.text[:1] in self.letters else float(len(c.text)) for c in g.completions) for g in groups]


ANY = "".join(chr(i) for i in range(33, 127))
PLAIN = "".join(chr(i) for i in range(33, 256))


def task(*rewards, **fields):
    return Task(PROMPTS, Mixture.of([Part(r) for r in rewards or (Counts(ANY),)]), **fields)


def ran(folder, objective, given=None, *, online=ONLINE, model=None, report=None, sink=lambda _: None, **changes):
    model = model or tiny()
    options = OPTIONS.model_copy(update=changes)
    return learn(model, given or task(), objective, options, online, folder=folder, report=report, sink=sink), model


def weights(model):
    return {n: p.detach().clone() for n, p in model.module.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    "objective", [GRPO(beta=0.01), RLOO(beta=0.01), PPO(beta=0.01), DPO(beta=0.5, anchor=0.3), EXO(labels="rewards"), SFT(), RWR()], ids=lambda o: o.name
)
def test_the_reward_rises(tmp_path, objective):
    result, _ = ran(tmp_path, objective, epochs=12, learning_rate=0.1, seed=1, online=ONLINE.model_copy(update={"k": 8}))
    first, last = ([h["reward"] for h in part] for part in (result.history[:3], result.history[-3:]))
    assert sum(last) / 3 > sum(first) / 3 + 0.3
    assert result.steps == result.planned == 12
    assert result.answers == 12 * 32


def test_at_the_first_step_the_policy_is_the_reference_and_sampler_and_scorer_agree(tmp_path):
    result, _ = ran(tmp_path, RLOO(), epochs=2)
    first, second = result.history
    assert abs(first["k1"]) < 1e-5
    assert abs(first["k3"]) < 1e-5
    assert abs(first["sampler_gap"]) < 1e-5
    assert second["k3"] > 1e-4


def test_every_scored_group_goes_to_the_sink_with_rewards_tokens_and_its_step(tmp_path):
    seen = []
    ran(tmp_path, RLOO(), epochs=2, sink=seen.append)
    assert len(seen) == 8
    assert {g.annotator for g in seen} == {"step 1", "step 2"}
    assert all(len(g.rewards) == 4 and all(len(c.tokens) == len(c.logprobs) for c in g.completions) for g in seen)


class Graded(Counts):
    """Keeps for audit what it took each answer for."""

    def audited(self, groups):
        return [(values, {"kind": ["many" if v > 2 else "few" for v in values]}) for values in self.score(groups)]


def test_every_kept_group_says_what_each_reward_said_and_took_the_answers_for(tmp_path):
    seen = []
    ran(tmp_path, RLOO(), task(Graded(ANY, "graded"), Counts("aeiou", "vowels")), epochs=1, sink=seen.append)
    for group in seen:
        texts = [c.text for c in group.completions]
        counted = [sum(c in ANY for c in text) for text in texts]
        assert group.provenance["rewards"] == {"graded": counted, "vowels": [sum(c in "aeiou" for c in text) for text in texts]}
        assert group.provenance["audit"] == {"graded": {"kind": ["many" if n > 2 else "few" for n in counted]}}
        assert Group.parse(group.line()).provenance == group.provenance


def test_a_finished_run_called_again_draws_nothing_more(tmp_path):
    whole, model = ran(tmp_path, RLOO(), epochs=2)
    seen = []
    again, other = ran(tmp_path, RLOO(), epochs=2, sink=seen.append)
    assert seen == []
    assert same(weights(model), weights(other))
    assert again.history == whole.history


@pytest.mark.parametrize("objective", [RLOO(), DPO()], ids=lambda o: o.name)
def test_the_same_object_goes_on_after_an_interruption_too(tmp_path, objective):
    """The adapter that the interrupted call put on it is not part of the reference."""

    def interrupt(step, steps, figures):
        if step == 3:
            raise KeyboardInterrupt

    straight, one = ran(tmp_path / "a", objective, epochs=4, save_every=1)
    model = tiny()
    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path / "b", objective, epochs=4, save_every=1, model=model, report=interrupt)
    again, _ = ran(tmp_path / "b", objective, epochs=4, save_every=1, model=model)
    assert again.history == straight.history
    assert same(weights(model), weights(one))


def test_a_run_on_a_trained_model_is_not_taken_up_from_another_adapter(tmp_path):
    first, second = (ran(tmp_path / str(seed), RLOO(), epochs=1, seed=seed)[1] for seed in (1, 2))
    ran(tmp_path / "run", RLOO(), epochs=2, model=first)
    with pytest.raises(DataError, match="from another model"):
        ran(tmp_path / "run", RLOO(), epochs=2, model=second)


def test_all_weights_are_not_taken_up_where_they_have_moved(tmp_path):
    _, model = ran(tmp_path, RLOO(), epochs=2, lora_rank=0, learning_rate=1e-3)
    with pytest.raises(DataError, match="from another model"):
        ran(tmp_path, RLOO(), epochs=2, lora_rank=0, learning_rate=1e-3, model=model)


@pytest.mark.parametrize("change", [{"objective": RLOO(beta=0.2)}, {"online": ONLINE.model_copy(update={"k": 5})}, {"given": task(Counts("xyz"))}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    ran(tmp_path, RLOO(), epochs=2, save_every=1)
    with pytest.raises(DataError, match="other prompts, rewards or options"):
        ran(tmp_path, change.get("objective", RLOO()), change.get("given"), online=change.get("online", ONLINE), epochs=2)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    ran(tmp_path, RLOO(), epochs=2, save_every=1)
    with pytest.raises(DataError, match="from another model"):
        ran(tmp_path, RLOO(), epochs=2, model=tiny(seed=1))


def test_answers_that_were_not_scored_teach_nothing_and_are_counted(tmp_path):
    result, _ = ran(tmp_path, RLOO(), task(Silent(PLAIN[:80])), epochs=2)
    assert 0 < result.left_out < result.answers
    assert result.history[0]["unscored"] > 0
    assert math.isfinite(result.history[-1]["loss"])


def test_a_reward_that_can_score_nothing_is_an_error_at_once(tmp_path):
    class Nothing(Counts):
        def score(self, groups):
            return [(None,) * len(g.completions) for g in groups]

    with pytest.raises(DataError, match="none of 4 answers could be scored"):
        ran(tmp_path, RLOO(), task(Nothing()))


def test_a_step_of_equal_rewards_changes_nothing_and_says_so(tmp_path):
    class Equal(Counts):
        def score(self, groups):
            return [(1.0,) * len(g.completions) for g in groups]

    before = tiny()
    for objective in (GRPO(beta=0.0), DPO()):
        result, model = ran(tmp_path / objective.name, objective, task(Equal()), epochs=1)
        assert result.history[0]["flat_share"] == 1.0
        assert torch.equal(model.score(_paths(model)).path_logp, before.score(_paths(before)).path_logp)


class Late(Counts):
    """Zero for all answers of the first calls: the look, and twelve steps."""

    def __init__(self):
        super().__init__(ANY, "late")
        self.calls = 0

    def score(self, groups):
        self.calls += 1
        return super().score(groups) if self.calls > 13 else [(0.0,) * len(g.completions) for g in groups]


@pytest.mark.parametrize("objective", [GRPO(beta=0.0), GRPO(), DPO()], ids=["grpo without KL", "grpo", "dpo"])
def test_the_first_reward_after_many_steps_without_does_not_stop(tmp_path, objective):
    """The KL term of flat steps has a gradient of rounding's size."""
    result, _ = ran(tmp_path, objective, task(Late()), epochs=16)
    assert [h["flat_share"] == 1.0 for h in result.history] == [True] * 12 + [False] * 4
    assert (result.steps, result.stop) == (16, "")


def test_groups_of_which_one_answer_was_scored_are_flat_too(tmp_path):
    class Mostly(Counts):
        def score(self, groups):
            found = super().score(groups)
            return [values if i else (values[0], *(None for _ in values[1:])) for i, values in enumerate(found)]

    result, _ = ran(tmp_path, RLOO(), task(Mostly(ANY)), epochs=1)
    # of four groups one has a single scored answer, the others unequal rewards
    assert result.history[0]["flat_share"] == 0.25


@pytest.mark.parametrize("objective", [RWR(), Unlikelihood()], ids=lambda o: o.name)
def test_an_objective_that_values_single_answers_is_given_their_rewards(tmp_path, objective):
    """Also where all answers to a prompt have one reward: there may be no better one, but each is good or bad."""

    class Bad(Counts):
        def score(self, groups):
            return [(-1.0,) * len(g.completions) for g in groups]

    result, model = ran(tmp_path, objective, task(Bad()), online=ONLINE.model_copy(update={"k": 1}), epochs=2)
    first = result.history[0]
    assert (first["flat_share"], first["left_out"]) == (0.0, 0.0)
    if objective == RWR():
        assert first["token_weight"] == pytest.approx(math.exp(-1.0))
    else:
        assert first["bad_share"] == 1.0
    assert not same(weights(model), weights(ran(tmp_path / "b", DPO(), task(Bad()), epochs=2)[1]))


def _paths(model):
    from fiducial.models.forest import Paths

    return Paths.of([model.encode(p.messages, "and so on") for p in PROMPTS])


def test_the_kl_budget_stops_a_run_and_says_why(tmp_path):
    result, _ = ran(tmp_path, RLOO(beta=0.0), online=ONLINE.model_copy(update={"kl_budget": 0.01}), epochs=20)
    assert result.stop.startswith("drift: k3 is")
    assert result.steps < 20
    again, _ = ran(tmp_path, RLOO(beta=0.0), online=ONLINE.model_copy(update={"kl_budget": 0.01}), epochs=20)
    assert (again.steps, again.stop) == (result.steps, result.stop)


def test_a_stronger_pull_keeps_the_policy_nearer(tmp_path):
    far, _ = ran(tmp_path / "a", RLOO(beta=0.0), epochs=12)
    near, _ = ran(tmp_path / "b", RLOO(beta=5.0), epochs=12)
    assert near.history[-1]["k3"] < far.history[-1]["k3"] / 2


def test_the_pull_moves_towards_the_target_by_its_formula(tmp_path):
    result, _ = ran(tmp_path, RLOO(beta=0.1), online=ONLINE.model_copy(update={"kl_target": 1000.0}), epochs=3)
    # no distance at all: beta (1 - 0.2 * 16 / 10000) after every step of 16 answers
    factor = 1 - 0.2 * 16 / 10_000
    assert [h["kl_weight"] for h in result.history] == pytest.approx([0.1, 0.1 * factor, 0.1 * factor**2])


def test_a_cut_answer_is_given_the_penalty(tmp_path):
    # a tiny model hardly ever ends by itself within two tokens
    result, _ = ran(tmp_path, RLOO(), online=ONLINE.model_copy(update={"max_tokens": 2, "end_penalty": -7.0}), epochs=1)
    assert result.history[0]["reward"] < -6.0
    assert result.history[0]["reward.counts"] >= 0.0


def test_several_rewards_are_standardised_on_the_first_look_and_logged_one_by_one(tmp_path):
    given = Task(PROMPTS, Mixture.of([Part(Counts(ANY)), Part(Counts(ANY, "more", 100.0)), Part(Counts("a", "watched"), 0.0)]))
    result, _ = ran(tmp_path, RLOO(), given, epochs=2)
    assert {"reward.counts", "reward.more", "reward.watched"} <= result.history[0].keys()
    assert abs(sum(result.before.rewards)) < 1e-6  # mean 0 where it was fitted
    assert result.history[0]["reward.more"] == pytest.approx(100 * result.history[0]["reward.counts"])


ASKED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
MANY = [Prompt(messages=user(f"question {c}"), expected="refuse") for c in ASKED] + [Prompt(messages=user("and this?"), expected="comply")]


@dataclass(frozen=True)
class OfKind(Reward):
    """What each kind of prompt is worth; nothing for others."""

    worth: tuple[tuple[str, float], ...]

    def score(self, groups):
        kinds = dict(self.worth)
        return [tuple(kinds[g.prompt.expected] * len(c.text) if g.prompt.expected in kinds else None for c in g.completions) for g in groups]


def test_what_is_looked_at_is_of_every_kind_whatever_comes_first_in_the_file():
    first = spread(MANY)[:32]
    assert [p.expected for p in first].count("comply") == 1
    assert spread([*reversed(MANY)]) == spread(MANY)
    halves = [p.model_copy(update={"expected": "comply" if i < 20 else "refuse"}) for i, p in enumerate(MANY[:40])]
    assert [p.expected for p in spread(halves)[:10]].count("comply") == 5
    assert sorted(spread(MANY), key=MANY.index) == MANY


def test_a_rare_kind_of_prompt_is_seen_before_and_after(tmp_path):
    result, _ = ran(tmp_path, RLOO(), Task(MANY, Mixture.of([Part(OfKind((("comply", 0.0),)))])), epochs=0.1)
    assert [r for r in result.before.rewards if r is not None] == [0.0]


def test_a_reward_that_is_silent_at_first_has_the_scale_of_answers_to_further_prompts(tmp_path):
    """With one prompt of 41 the 32 that are looked at hold one it scores; of eight, the further nine bring the others."""
    given = [p.model_copy(update={"expected": "comply"}) if i < 8 else p for i, p in enumerate(MANY)]
    loud = OfKind((("comply", 100.0),))
    seen = []
    result, _ = ran(tmp_path, RLOO(), Task(given, Mixture.of([Part(Counts(ANY)), Part(loud)])), epochs=0.1, sink=seen.append)
    assert result.steps == 2
    assert max(abs(r) for g in seen for r in g.rewards) < 15  # not hundreds


@pytest.mark.parametrize("kinds", [(), (("comply", 100.0),)], ids=["none", "one answer"])
def test_a_reward_that_says_too_little_for_a_scale_is_an_error_and_no_unscaled_part(tmp_path, kinds):
    with pytest.raises(ConfigError, match=r"'ofkind' scores fewer than 2 of 41 answers, so that it cannot be put on one scale"):
        ran(tmp_path, RLOO(), Task(MANY, Mixture.of([Part(Counts(ANY)), Part(OfKind(kinds), name="ofkind")])))
    alone = Task(MANY, Mixture.of([Part(Counts(ANY)), Part(OfKind(kinds), 0.0, "watched")]))  # what does not count needs no scale
    assert ran(tmp_path, RLOO(), alone, epochs=0.1)[0].steps == 2


def test_other_prompts_with_other_answers_stop_no_run(tmp_path):
    """Nothing is learnt at this rate, and after 20 steps, which are 40 answers, the 4 prompts are looked at again."""
    online = ONLINE.model_copy(update={"k": 2, "length_change": 0.05})
    result, _ = ran(tmp_path, RWR(), online=online, batch=1, epochs=5.25, learning_rate=1e-12)
    usual = result.before.figures["length"]
    assert any(abs(h["length"] - usual) > 0.05 * usual for h in result.history)
    assert (result.stop, result.steps) == ("", result.planned)
    assert result.after.figures == result.before.figures


def test_answers_that_grow_on_the_same_prompts_stop_a_run_at_the_next_look(tmp_path):
    online = ONLINE.model_copy(update={"length_change": 0.01, "k": 8})
    result, _ = ran(tmp_path, RLOO(beta=0.0), task(Counts(" ")), online=online, epochs=24, learning_rate=0.1)
    assert result.stop.startswith("length: answers to the same prompts have")
    assert result.steps % 2 == 0  # 4 prompts are looked at after each 40 answers, and a step draws 32
    assert result.steps < result.planned


def test_under_a_cost_limit_the_multiplier_moves_and_the_best_checkpoint_is_taken(tmp_path):
    given = task(cost=Counts(ANY, "cost"), multiplier=Multiplier(limit=-1.0, weight=1.0))
    result, model = ran(tmp_path, RLOO(beta=0.0), given, epochs=6, save_every=2)
    weight = [h["multiplier"] for h in result.history]
    assert weight[0] == weight[1] == 1.0
    assert weight[2] > weight[1]  # every cost is above the limit
    kept = {p.name for p in tmp_path.glob("front-*.safetensors")}
    assert f"front-{result.best.step}.safetensors" in kept
    from safetensors.torch import load_file

    stored = load_file(tmp_path / f"front-{result.best.step}.safetensors")
    assert all(torch.equal(value, dict(model.module.named_parameters())[name]) for name, value in stored.items())


@pytest.mark.parametrize(("weight", "sign"), [(19.0, -1), (0.02, 1)])
def test_under_a_cost_limit_the_multiplier_decides_where_ppo_goes(tmp_path, weight, sign):
    """Reward and cost are the same number, so that only the balance tells what is better."""
    given = task(cost=Counts(ANY, "cost"), multiplier=Multiplier(limit=-1.0, weight=weight, rate=1e-9))
    result, _ = ran(tmp_path, PPO(beta=0.01), given, epochs=12, learning_rate=0.1, seed=1, online=ONLINE.model_copy(update={"k": 8}))
    first, last = ([h["reward"] for h in part] for part in (result.history[:3], result.history[-3:]))
    assert sign * (sum(last) - sum(first)) / 3 > 0.3


def test_only_an_objective_that_values_cost_has_a_critic_of_it(tmp_path):
    found = {o: ran(tmp_path / o.name, o, task(cost=Counts(ANY, "cost")), epochs=1) for o in (PPO(), RLOO())}
    (ppo, has), (rloo, has_not) = found.values()
    assert (has.cost_head.trained_by, has.cost_head.higher_is) == ("align/ppo", "worse")
    assert has_not.cost_head is None
    assert "cost_explained" in ppo.history[0].keys() - rloo.history[0].keys()
    _, without = ran(tmp_path / "b", PPO(), epochs=1, model=has)
    assert (without.head is has.head, without.cost_head) == (True, None)


def test_an_answer_whose_cost_is_unknown_is_left_out_whoever_values_it(tmp_path):
    for objective in (PPO(), RLOO()):
        result, _ = ran(tmp_path / objective.name, objective, task(cost=Silent(PLAIN[:80], "cost")), epochs=2)
        assert 0 < result.left_out < result.answers
        assert math.isfinite(result.history[-1]["loss"])


@dataclass(frozen=True)
class Merged(SampledObjective):
    """Reads values, and knows of no cost."""

    reads: ClassVar = ("tokens", "values")
    seen: ClassVar = []
    beta: float = 0.0

    def lessons(self, old, reference, *, room):
        self.seen.append(old)
        return RLOO(beta=0.0).lessons(old, reference, room=room)

    def surrogate(self, policy, reference):
        return RLOO(beta=0.0).surrogate(policy, reference)


def test_to_any_other_objective_the_rewards_are_less_the_weighed_cost(tmp_path):
    _, model = ran(tmp_path, Merged(), task(Counts(ANY), cost=Counts(ANY, "cost"), multiplier=Multiplier(limit=-1.0, weight=3.0)), epochs=1)
    (old,) = Merged.seen
    assert old.costs is None
    assert model.cost_head is None
    # (r - 3 r) / 4, for r that is a number of letters
    assert set((-2 * old.rewards).flatten().tolist()) <= set(range(7))
    assert old.rewards.min() < 0


class Apart(Merged):
    """Values the cost by itself."""

    values_cost: ClassVar = True
    seen: ClassVar = []


def test_an_objective_that_values_cost_is_given_rewards_as_they_were_said_each_beside_its_cost(tmp_path):
    seen = []
    given = task(Silent(PLAIN[:40]), cost=Counts("aeiou", "cost"), multiplier=Multiplier(limit=-1.0, weight=3.0))
    ran(tmp_path, Apart(), given, epochs=1, sink=seen.append)
    (old,) = Apart.seen
    answers = [(c.text, reward) for group in seen for c, reward in zip(group.completions, group.rewards, strict=True) if reward is not None]
    assert 0 < len(answers) < 16
    assert old.rewards[old.mask].tolist() == [reward for _, reward in answers]
    assert old.costs[old.mask].tolist() == [sum(letter in "aeiou" for letter in text) for text, _ in answers]
    assert old.cost_weight == 3.0
    assert old.tokens.cost_values.shape == old.tokens.values.shape == old.tokens.logp.shape


def test_weights_that_a_checkpoint_names_are_there_until_the_next_one_stands(tmp_path, monkeypatch):
    """What is cheaper here is also better, so that each new best replaces the one before."""
    from fiducial.training import checkpoint

    named, save = [], checkpoint.save

    def saved(folder, **given):
        assert all((folder / f"front-{step}.safetensors").is_file() for points in named[-1:] for step, *_ in points)
        save(folder, **given)
        named.append(given["state"]["points"])

    monkeypatch.setattr(checkpoint, "save", saved)
    ran(tmp_path, RLOO(beta=0.0), task(cost=Counts(ANY, "cost", -1.0)), epochs=6, save_every=1)
    assert len({points[-1].step for points in named}) > 1
    assert {p.name for p in tmp_path.glob("front-*")} == {f"front-{p.step}.safetensors" for p in named[-1]}


def test_demonstrations_are_imitated_besides(tmp_path):
    shown = [Group(prompt=PROMPTS[i], completions=(Completion(text="no, no"),)) for i in range(2)]
    paths = [tiny().encode(PROMPTS[i].messages, "no, no") for i in range(2)]
    from fiducial.models.forest import Paths

    def likelihood(model):
        return float(model.score(Paths.of(paths)).path_mean.mean())

    for objective in (PPO(), RLOO()):
        _, with_them = ran(tmp_path / f"a/{objective.name}", objective, task(demonstrations=shown), epochs=3, learning_rate=3e-2)
        _, without = ran(tmp_path / f"b/{objective.name}", objective, epochs=3, learning_rate=3e-2)
        assert likelihood(with_them) > likelihood(without) + 0.3


def test_all_weights_can_train_and_the_reference_stays_what_it_was(tmp_path):
    result, model = ran(tmp_path, RLOO(), epochs=3, lora_rank=0, learning_rate=1e-3)
    assert not same(weights(model), weights(tiny()))
    assert abs(result.history[0]["k3"]) < 1e-6
    assert result.history[-1]["k3"] > 0


def test_a_run_on_a_trained_model_takes_that_model_as_its_reference(tmp_path):
    """Iterations of online preference optimisation: each is held to where it began."""
    _, model = ran(tmp_path / "a", DPO(), epochs=3)
    result, _ = ran(tmp_path / "b", DPO(), epochs=2, model=model)
    assert abs(result.history[0]["k3"]) < 1e-6


@pytest.mark.parametrize(
    ("objective", "online", "fields", "message"),
    [
        (RLOO(), {"k": 1}, {}, "compares answers, but k is 1"),
        (SFT(), {"k": 1}, {}, "compares answers, but k is 1"),
        (RLOO(beta=0.0), {"kl_target": 1.0}, {}, "but beta is 0"),
        (DPO(), {"kl_target": 1.0}, {}, "has no KL term to move"),
        (RLOO(), {"kl_horizon": 50.0}, {}, "kl_horizon has no effect without kl_target"),
        (RLOO(), {"mix": 0.5}, {}, "mix has no effect without demonstrations"),
        (PPO(), {"mix": 0.0}, {}, "mix has no effect without demonstrations"),
        (DPO(), {}, {"demonstrations": [Group(prompt=PROMPTS[0], completions=(Completion(text="a"),))]}, "takes no demonstrations"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(tmp_path, objective, online, fields, message):
    with pytest.raises(ConfigError, match=message):
        ran(tmp_path, objective, task(**fields), online=ONLINE.model_copy(update=online))


@pytest.mark.parametrize("change", [{"from_scratch": True}, {"sizes": {"num_hidden_layers": 1}}, {"learn": "all"}, {"neftune": 5.0}, {"watch_every": 5}])
def test_options_of_training_from_data_are_refused_by_name(tmp_path, change):
    with pytest.raises(ConfigError, match=f"{next(iter(change))} says nothing"):
        ran(tmp_path, RLOO(), **change)


def test_demonstrations_that_do_not_fit_are_left_out_and_counted(tmp_path):
    none, long, fine = (Group(prompt=PROMPTS[0], completions=c) for c in ((), (Completion(text="a" * 5000),), (Completion(text="no"),)))
    result, _ = ran(tmp_path, RLOO(), task(demonstrations=[none, long, fine]), epochs=1)
    assert result.demonstrations == 1
    with pytest.raises(DataError, match="none of 2 demonstrations can be imitated"):
        ran(tmp_path / "b", RLOO(), task(demonstrations=[none, long]))


def test_demonstrations_of_no_weight_change_nothing(tmp_path):
    shown = [Group(prompt=PROMPTS[0], completions=(Completion(text="no, no"),))]
    _, with_them = ran(tmp_path / "a", RLOO(), task(demonstrations=shown), online=ONLINE.model_copy(update={"mix": 0.0}), epochs=2)
    _, without = ran(tmp_path / "b", RLOO(), epochs=2)
    assert same(weights(with_them), weights(without))


def test_prompts_that_do_not_fit_are_left_out_and_counted(tmp_path):
    long = Prompt(messages=user("a" * 5000))
    result, _ = ran(tmp_path, RLOO(), Task([*PROMPTS, long], task().rewards), epochs=1)
    assert result.prompts == 4
    with pytest.raises(DataError, match="none of 1 prompts fits"):
        ran(tmp_path / "b", RLOO(), Task([long], task().rewards))


def test_time_that_is_spent_ends_a_run_and_more_time_goes_on(tmp_path):
    short, _ = ran(tmp_path, RLOO(), epochs=6, minutes=1e-6)
    assert short.stop == "the budget of 1e-06 minutes is spent"
    assert short.steps == 1
    whole, model = ran(tmp_path, RLOO(), epochs=6, minutes=10.0)
    _, plain = ran(tmp_path / "b", RLOO(), epochs=6)
    assert (whole.steps, whole.stop) == (6, "")
    assert same(weights(model), weights(plain))
