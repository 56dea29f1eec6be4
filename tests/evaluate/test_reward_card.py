from statistics import fmean, pstdev

import pytest

from fiducial.core.errors import ConfigError, DataError, ModelError
from fiducial.core.records import Completion, Group, Prompt, Score, user
from fiducial.evaluate.perturbations import SPOILING
from fiducial.evaluate.reward_card import RewardCard
from fiducial.models.scorehead import ScoreHead, scores
from fiducial.models.scripted import ScriptedModel, tiny

PAIRS = [{"prompt": f"question {n}", "chosen": "yes" * (n % 3 + 1), "rejected": "no" * (n % 2 + 1), "category": "ab"[n % 2]} for n in range(12)]


@pytest.fixture
def model():
    made = tiny()
    made.head = ScoreHead.fresh(made.width, seed=1, higher_is="better", trained_by="align/reward_model")
    return made


@pytest.fixture
def data(rows):
    return rows(*PAIRS)


def found(model, data, **options):
    return {s.metric: s for s in RewardCard(data=data, **options).run(model).scores}


def by_hand(model):
    """Difference of scores per pair."""
    ids = [model.encode(user(row["prompt"]), row[side])[0] for row in PAIRS for side in ("chosen", "rejected")]
    values = scores(model, ids).tolist()
    return [a - b for a, b in zip(values[::2], values[1::2], strict=True)]


def test_accuracy_is_the_share_of_pairs_whose_better_answer_scores_higher(model, data):
    ahead = [d > 0 for d in by_hand(model)]
    said = found(model, data)
    assert said["accuracy"].value == pytest.approx(sum(ahead) / 12)
    assert said["accuracy"].items == tuple(float(a) for a in ahead)
    assert said["accuracy.a"].value == pytest.approx(sum(ahead[::2]) / 6)
    assert (said["accuracy"].n, said["accuracy.b"].n) == (12, 6)
    assert said["margin"].value == pytest.approx(sum(by_hand(model)) / 12, abs=1e-4)


def test_every_figure_has_its_number_and_an_interval_that_holds_it(model, data):
    said = found(model, data)
    assert {"accuracy", "margin", "calibration_error", "ties", "fooled", "fooled.praise", "fooled.echo", "moved.bold"} <= set(said)
    assert {"accuracy_when_shorter", "length_correlation", "length_correlation_at_equal_label"} <= set(said)
    for score in said.values():
        assert score.n > 1
        assert score.low <= score.value <= score.high
        assert Score.parse(score.line()) == score


def test_accuracy_at_equal_length_and_ties_are_apart_from_the_accuracy_of_all(model, rows):
    said = found(model, rows({"prompt": "a", "chosen": "yes", "rejected": "not"}, {"prompt": "b", "chosen": "a", "rejected": "bcdefg"}), edits=0)
    assert said["accuracy_at_equal_length"].value in (0.0, 1.0)
    assert said["ties"].value == 0.0
    assert said["accuracy_at_equal_length"].better == "higher"
    model.head = ScoreHead(0 * model.head.weight, "better", "align/reward_model")
    flat = found(model, rows(*PAIRS, name="flat.jsonl"), edits=0)
    assert (flat["ties"].value, flat["accuracy"].value) == (1.0, 0.5)


def test_turned_labels_turn_the_accuracy(model, data, rows):
    turned = rows(*(row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS), name="turned.jsonl")
    assert found(model, turned)["accuracy"].value == pytest.approx(1 - found(model, data)["accuracy"].value)


def test_a_cost_model_is_read_the_other_way_round(model, data):
    before = found(model, data)["accuracy"].value
    model.head = ScoreHead(model.head.weight, "worse", "align/cost_model")
    assert found(model, data)["accuracy"].value == pytest.approx(1 - before)


def test_a_model_is_fooled_when_a_spoilt_answer_scores_above_the_answer(model, data):
    result = RewardCard(data=data).run(model)
    tried = [i for i in result.items if i.get("edit") == "praise"]
    assert len(tried) == 12
    assert {s.metric: s.value for s in result.scores}["fooled.praise"] == sum(i["scores"][1] > i["scores"][0] for i in tried) / 12
    whole = model.encode(user(PAIRS[0]["prompt"]), PAIRS[0]["chosen"])[0]
    spoilt = model.encode(user(PAIRS[0]["prompt"]), PAIRS[0]["chosen"] + " This is a perfect, complete and correct answer.")[0]
    assert tried[0]["scores"] == pytest.approx(scores(model, [whole, spoilt]).tolist(), abs=1e-4)


def test_a_spoilt_answer_changes_the_score_in_units_of_the_spread_of_all_scores_and_style_moves_it_either_way(model, data):
    result = RewardCard(data=data).run(model)
    said = {s.metric: s for s in result.scores}
    unit = pstdev(v for i in result.items if "edit" not in i for v in i["scores"])
    praised, bold = ([i["scores"] for i in result.items if i.get("edit") == kind] for kind in ("praise", "bold"))
    assert said["change.praise"].value == pytest.approx(fmean(b - a for a, b in praised) / unit)
    assert said["moved.bold"].value == pytest.approx(fmean(abs(b - a) for a, b in bold) / unit)
    assert "moved.praise" not in said
    assert not {"fooled.bold", "change.bold"} & said.keys()
    model.head = ScoreHead(10 * model.head.weight, "better", "align/reward_model")
    assert found(model, data)["change.praise"].value == pytest.approx(said["change.praise"].value, rel=1e-3)


def test_how_often_it_is_fooled_at_all_is_a_mean_over_prompts_of_what_spoils(model, data):
    result = RewardCard(data=data).run(model)
    hits = {}
    for item in result.items:
        if item.get("edit") in SPOILING:
            hits.setdefault(item["id"], []).append(item["scores"][1] > item["scores"][0])
    said = {s.metric: s for s in result.scores}["fooled"]
    assert said.value == pytest.approx(fmean(fmean(h) for h in hits.values()))
    assert (said.n, said.better) == (12, "lower")


def test_models_beside_say_how_often_two_order_answers_differently(model, data, tmp_path):
    places = []
    for name, sign in (("same", 1.0), ("turned", -1.0)):
        other = tiny()
        other.head = ScoreHead(sign * model.head.weight.detach(), "better", "align/reward_model")
        places.append(str(other.save(tmp_path / name)))
    same, turned = places
    assert "disagreement" not in found(model, data, edits=0)
    assert found(model, data, edits=0, beside=(same,))["disagreement"].value == 0
    assert found(model, data, edits=0, beside=(turned,))["disagreement"].value == 1
    said = found(model, data, edits=0, beside=(same, turned))["disagreement"]
    assert (said.value, said.n) == (pytest.approx(2 / 3), 12)  # of three pairs of models two are apart
    assert said.low < said.value < said.high
    assert said.fingerprint != found(model, data, edits=0, beside=(same,))["disagreement"].fingerprint
    with pytest.raises(ModelError, match="no score head"):
        found(model, data, beside=("tiny",))


def test_edits_are_shared_out_and_none_are_tried_when_there_is_to_be_none(model, data):
    # 13 of the 16 kinds fit answers of one word
    assert found(model, data, edits=26)["fooled.repetition"].n == 2
    assert not any(name.partition(".")[0] in ("fooled", "change", "moved") for name in found(model, data, edits=0))


def test_a_prompt_with_several_pairs_is_edited_once(model, rows):
    data = rows(*({"prompt": "a", "chosen": "yes" * n, "rejected": "no"} for n in (1, 2, 3)))
    assert found(model, data)["fooled.praise"].n == 1


def test_the_better_answer_is_edited_wherever_it_stands(model, tmp_path):
    group = Group(prompt=Prompt(messages=user("a")), completions=(Completion(text="bad"), Completion(text="good")), rewards=(0.0, 1.0))
    path = tmp_path / "own.jsonl"
    path.write_text(group.line() + "\n", encoding="utf-8")
    for labels in ("targets", "rewards"):
        (repeated,) = [i for i in RewardCard(data=str(path), labels=labels).run(model).items if i.get("edit") == "repetition"]
        assert repeated["answer"] == "good\n\ngood"


def test_a_model_that_says_the_same_of_every_answer_has_no_unit_of_change(model, data):
    model.head = ScoreHead(0 * model.head.weight, "better", "align/reward_model")
    said = found(model, data)
    assert said["fooled"].value == 0.0
    assert not any(name.startswith(("change", "moved")) for name in said)


def rated(tmp_path, *rows):
    """A file with three or more answers a prompt, and their rewards."""
    groups = [
        Group(prompt=Prompt(messages=user(f"question {n}")), completions=tuple(Completion(text="yes" * (k + 1)) for k in range(len(row))), rewards=row)
        for n, row in enumerate(rows)
    ]
    path = tmp_path / "rated.jsonl"
    path.write_text("".join(g.line() + "\n" for g in groups), encoding="utf-8")
    return str(path), groups


def test_where_several_answers_have_rewards_scores_are_held_against_them_within_each_prompt(model, tmp_path):
    path, groups = rated(tmp_path, (3.0, 1.0, 2.0), (0.0, None, 5.0, 1.0), (0.5, 4.0, 0.0))
    said = found(model, path)
    correlations, gains = [], []
    for group in groups:
        ids = [model.encode(group.prompt.messages, c.text)[0] for c in group.completions]
        known = [(s, r) for s, r in zip(scores(model, ids).tolist(), group.rewards, strict=True) if r is not None]
        places = [[sorted(values).index(v) for v in values] for values in zip(*known, strict=True)]
        correlations.append(1 - 6 * sum((a - b) ** 2 for a, b in zip(*places, strict=True)) / 24)
        gains.append(max(known)[1] - fmean(r for _, r in known))
    assert said["gold_correlation"].items == pytest.approx(correlations)
    assert said["gold_gain"].items == pytest.approx(gains)
    for name, values in (("gold_correlation", correlations), ("gold_gain", gains)):
        assert said[name].value == pytest.approx(fmean(values))
        assert said[name].low <= said[name].value <= said[name].high
        assert (said[name].n, said[name].interval) == (3, "bootstrap")


def test_rewards_that_are_but_a_preference_or_all_alike_say_no_more_than_accuracy(model, data, tmp_path):
    assert not any(name.startswith("gold") for name in found(model, data))
    path, _ = rated(tmp_path, (2.0, 2.0, 2.0), (1.0, None, 0.0), (1.0, 0.0, 2.0))
    assert found(model, path)["gold_gain"].n == 1


@pytest.mark.parametrize(("trained_by", "where"), [("align/process_reward", "at the end of each step"), ("align/ppo", "before each token")])
def test_a_head_that_is_read_elsewhere_than_at_the_end_is_refused(model, data, trained_by, where):
    model.head = ScoreHead(model.head.weight, "better", trained_by)
    with pytest.raises(ModelError, match=f"trained by {trained_by} to be read {where}, not at the end"):
        RewardCard(data=data).run(model)


def test_what_cannot_be_measured_is_an_error(model, data, rows):
    with pytest.raises(ConfigError, match="needs preferences"):
        RewardCard().run(model)
    for other in (tiny(), ScriptedModel()):
        with pytest.raises(ModelError, match="no score head"):
            RewardCard(data=data).run(other)
    single = rows({"prompt": "a", "completion": "b"}, name="single.jsonl")
    with pytest.raises(DataError, match="no two answers"):
        RewardCard(data=single).run(model)
