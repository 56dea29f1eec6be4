"""Drift, length and repetition on fresh samples, and the rules on them."""

import math
from math import exp, nan

import pytest
import torch

from fiducial.core.records import Completion, user
from fiducial.models.forest import Paths
from fiducial.models.scripted import tiny
from fiducial.training import lora
from fiducial.training.loop import TrainResult
from fiducial.training.reportcard import FreshSamples, card, displacement, says, style, verdict

PROMPTS = [user(f"what is {n}?") for n in range(3)]


def adapted(model, scale=0.0):
    model.module = lora.attach(model.module, rank=4)
    for name, p in model.module.named_parameters():
        if "lora_B" in name:
            p.data = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_an_untouched_model_has_not_drifted_and_passes_every_rule():
    model = tiny()
    watch = FreshSamples(model, PROMPTS, max_tokens=100)  # long enough for words to repeat
    figures, stop = watch(1, adapted(model))
    assert figures["k1"] == pytest.approx(0.0, abs=1e-5)
    assert figures["k3"] == pytest.approx(0.0, abs=1e-5)
    assert figures["length"] == figures["base_length"]
    assert stop == ""
    assert {outcome for outcome, _ in watch.rules(figures).values()} == {"pass"}


def test_k1_and_k3_are_the_estimators_of_the_log_ratio_of_what_was_sampled():
    model, base = tiny(), tiny()
    watch = FreshSamples(model, PROMPTS, max_tokens=6)
    model = adapted(model, 0.1)
    figures, _ = watch(1, model)
    ratios = []
    for prompt, (completion,) in zip(PROMPTS, model.sample(PROMPTS, max_tokens=6, temperature=1.0, seed=0), strict=True):
        ids, start = base.encode(prompt)
        end = [2] if completion.finish == "stop" else []  # <|im_end|>
        path = Paths.of([([*ids, *completion.tokens, *end], start)])
        ratios.append(float(model.score(path).path_logp - base.score(path).path_logp))
    assert figures["k1"] == pytest.approx(sum(ratios) / 3, abs=1e-4)
    assert figures["k3"] == pytest.approx(sum(exp(-r) - 1 + r for r in ratios) / 3, abs=1e-4)
    assert figures["k3"] > 0


def test_a_model_that_has_moved_far_is_stopped_for_drift():
    model = tiny()
    watch = FreshSamples(model, PROMPTS, max_tokens=8, kl_budget=0.5)
    _, stop = watch(1, adapted(model, 1.0))
    assert stop.startswith("drift: k3 is ")


def test_where_all_weights_train_drift_is_measured_against_the_base_that_was_given():
    model, base = tiny(), tiny()
    watch = FreshSamples(model, PROMPTS, base=base, max_tokens=8)
    figures, _ = watch(1, model)
    assert (figures["k1"], figures["k3"]) == (0.0, 0.0)
    with torch.no_grad():
        model.module.lm_head.weight.mul_(1.3)
    assert watch(2, model)[0]["k3"] > 0.01


def test_where_all_weights_train_without_a_base_drift_is_not_measured_and_no_pass():
    model = tiny()
    watch = FreshSamples(model, PROMPTS, max_tokens=8)
    with torch.no_grad():
        model.module.lm_head.weight.mul_(3)
    figures, _ = watch(1, model)
    assert "k3" not in figures
    assert watch.rules(figures)["drift"] == ("not measured", "not measured")


def test_a_resumed_model_is_compared_with_its_base_and_not_with_itself():
    fresh = FreshSamples(tiny(), PROMPTS, max_tokens=8)
    resumed = FreshSamples(adapted(tiny(), 1.0), PROMPTS, max_tokens=8)
    assert resumed.base == fresh.base


def test_the_same_seed_samples_the_same():
    model = adapted(tiny(), 0.2)
    watch = FreshSamples(model, PROMPTS, max_tokens=8, kl_budget=1e9)
    assert watch(1, model) == watch(1, model)


RULES = [
    ({"k3": 10.0}, "drift", "pass"),
    ({"k3": 10.1}, "drift", "fail"),
    ({"k3": nan}, "drift", "not measured"),
    ({"length": 15.0, "base_length": 10.0}, "length", "pass"),
    ({"length": 15.1, "base_length": 10.0}, "length", "fail"),
    ({"length": 5.0, "base_length": 10.0}, "length", "pass"),
    ({"length": 4.9, "base_length": 10.0}, "length", "fail"),
    ({"length": 4.9}, "length", "not measured"),
    ({"repetition": 0.5, "base_repetition": 0.25}, "repetition", "pass"),
    ({"repetition": 0.51, "base_repetition": 0.25}, "repetition", "fail"),
    ({"repetition": 0.1, "base_repetition": 0.0}, "repetition", "pass"),
    ({"repetition": 0.11, "base_repetition": 0.0}, "repetition", "fail"),
    ({"repetition": 0.0}, "repetition", "not measured"),
]


@pytest.mark.parametrize(("figures", "rule", "outcome"), RULES)
def test_each_rule_passes_at_its_limit_and_fails_beyond(figures, rule, outcome):
    watch = FreshSamples(tiny(), [])
    found, sentence = watch.rules(figures)[rule]
    assert found == outcome
    assert sentence


def test_nothing_sampled_is_nothing_measured():
    model = tiny()
    watch = FreshSamples(model, [])
    figures, stop = watch(1, model)
    assert stop == ""
    assert {outcome for outcome, _ in watch.rules(figures).values()} == {"not measured"}


def test_style_counts_words_and_repeated_four_grams_within_each_text():
    texts = [(None, "a b c d a b c d", None), (None, "a b c d", None)]
    # first text: 5 four-grams, of which abcd is there twice: 1 repeat; second: 1 and 0
    assert style(texts) == {"length": 6.0, "repetition": pytest.approx(1 / 6), "distinct_2": 0.4}  # ab, bc, cd, da of ten pairs
    assert style([(None, "short", None)]) == {"length": 1.0}  # nothing can repeat in it
    assert style([(None, "a b a b", None), (None, "b a", None)])["distinct_2"] == 2 / 4  # ab, ba, ab, ba
    assert style([]) == {}


def test_a_text_without_white_space_is_counted_in_characters():
    # 8 characters, 5 four-grams, of which 我不能说 is there twice; of 7 pairs 我不 不能 能说 say and come again, 说我 once
    assert style([(None, "我不能说我不能说", None)]) == {"length": 8.0, "repetition": 0.2, "distinct_2": 4 / 7}
    assert style([(None, "OK 我不能", None)])["length"] == 4.0


def test_where_no_answer_is_long_enough_to_repeat_repetition_is_not_measured():
    watch = FreshSamples(tiny(), [])
    figures = style([(None, "a b c", None)])
    assert watch.rules(figures | {f"base_{name}": value for name, value in figures.items()})["repetition"] == ("not measured", "not measured")


def test_a_model_that_has_learnt_to_say_nothing_is_stopped(monkeypatch):
    model = adapted(tiny())
    watch = FreshSamples(model, PROMPTS, max_tokens=8)
    silent = (Completion(text="", finish="stop"),)
    monkeypatch.setattr(type(model), "sample", lambda self, conversations, **_: [silent for _ in conversations])
    figures, stop = watch(1, model)
    assert (figures["length"], figures["samples"]) == (0.0, 3.0)
    assert stop.startswith("length: ")


def test_a_model_that_fails_to_answer_has_no_figures(monkeypatch):
    model = adapted(tiny())
    watch = FreshSamples(model, PROMPTS, max_tokens=8)
    failed = (Completion(text="", finish="error", error="no"),)
    monkeypatch.setattr(type(model), "sample", lambda self, conversations, **_: [failed for _ in conversations])
    figures, _ = watch(1, model)
    assert all(math.isnan(figures.get(k, nan)) for k in ("k1", "k3", "length"))


def test_the_verdict_is_a_pass_only_when_every_rule_was_measured_and_kept():
    kept, broken, unknown = ("pass", ""), ("fail", ""), ("not measured", "")
    assert verdict({"a": kept, "b": kept}) == "pass"
    assert verdict({"a": kept, "b": unknown}) == "not measured"
    assert verdict({"a": unknown, "b": broken}) == "fail"
    assert verdict({}) == "not measured"


def test_the_sentence_of_a_verdict_names_what_it_does_not_rest_on():
    kept, broken, unknown = ("pass", ""), ("fail", ""), ("not measured", "")
    assert says({"a": kept, "b": kept}).startswith("pass of 2 rules; whether")
    assert says({"a": kept, "b": kept}, ["c", "d"]).startswith("pass of 2 rules; not measured: c, d; whether")
    assert says({"a": kept, "b": unknown}, ["b", "c"]).startswith("no verdict, 1 of 2 rules pass; not measured: b, c; a falling loss")
    assert says({"a": kept, "b": broken, "c": unknown}).startswith("fail of 1 in 3 rules; not measured: c; do not use")


def result(**fields):
    return TrainResult(steps=1, planned=1, groups=1, left_out=0, tokens=1, naive_tokens=1, seconds=0.1, stop="", **fields)


def test_preferred_answers_that_lost_probability_get_a_sentence():
    def remarks(share, **fields):
        return card(None, {}, result(history=[{"displaced": share}] * 20, **fields))["remarks"]

    assert remarks(0.7) == []
    (usual,) = remarks(0.8)
    assert "which were not measured" in usual
    assert "within their limits" in displacement(0.8, answers=["pass", "pass"])
    assert usual.startswith("80% of the preferred answers have lost probability")
    assert "usual" in usual
    # what was held out says more than the last steps
    assert remarks(0.8, looks=[{"step": 20.0, "groups": 4.0, "loss": 1.0, "displaced": 0.1}]) == []
    assert "dangerous" in displacement(0.8, answers=["pass", "fail"])
    assert "anchor" in displacement(0.8, answers=["pass", "fail"])


def test_held_out_groups_are_a_rule_and_figures_where_there_are_such():
    looks = [{"step": 0.0, "groups": 4.0, "loss": 2.0, "accuracy": 0.5}, {"step": 9.0, "groups": 4.0, "loss": 1.0, "accuracy": 0.25}]
    groups, before = ([{"loss": 1.0, "accuracy": a} for a in values] for values in ([1.0, 0.0, 0.0, 0.0], [1.0, 0.4, 0.3, 0.3]))
    found = card(None, {}, result(looks=looks, held_before=before, held_out=groups))
    assert found["rules"]["held_out"]["outcome"] == "fail"
    assert found["rules"]["held_out"]["sentence"].startswith("accuracy on 4 held-out groups is 0.25, and was 0.5 (change -0.25")
    assert found["verdict"] == "fail"  # whatever the loss says
    (accuracy,) = [f for f in found["figures"] if f["name"] == "held-out accuracy"]
    assert (accuracy["value"], accuracy["n"]) == (0.25, 4)
    assert accuracy["low"] < 0.25 < accuracy["high"]


def test_a_loss_that_falls_is_no_verdict():
    falling = [{"step": float(n), "loss": 1.0 / n} for n in range(1, 50)]
    found = card(None, {}, result(history=falling), why="there were no prompts")
    assert found["verdict"] == "not measured"
    assert found["says"] == "no verdict, 0 of 3 rules pass; not measured: drift, length, repetition; a falling loss alone shows nothing"
    assert {rule["sentence"] for rule in found["rules"].values()} == {"there were no prompts"}
    assert found["figures"] == found["answers"] == []


def test_a_card_has_figures_with_intervals_and_pairs_of_answers():
    model = tiny()
    watch = FreshSamples(model, PROMPTS, max_tokens=8)
    figures, _ = watch(1, adapted(model, 0.2))
    found = card(watch, figures, result())
    by_name = {f["name"]: f for f in found["figures"]}
    assert by_name["drift k3, nats per answer"]["value"] == pytest.approx(figures["k3"])
    assert by_name["words per answer, trained model"]["value"] == pytest.approx(figures["length"])
    assert all(f["low"] <= f["value"] <= f["high"] and f["n"] >= 2 for f in found["figures"])
    assert [pair.keys() for pair in found["answers"]] == [{"before", "after"}] * 3
