"""The stream of scored parts, which all methods of pretraining with feedback read alike."""

import json

import pytest
import torch

from fiducial.align.awr import AWR
from fiducial.align.conditional_pretraining import ConditionalPretraining
from fiducial.align.filtered_pretraining import FilteredPretraining
from fiducial.align.rwr import RWR
from fiducial.align.unlikelihood import Unlikelihood
from fiducial.core.records import Completion, Group, Prompt, user
from fiducial.core.roles import Reward
from fiducial.data.documents import document
from fiducial.data.formats import read_groups
from fiducial.models.control import ALIGNED, MISALIGNED
from fiducial.models.scripted import tiny
from fiducial.training.data import Data
from fiducial.training.loop import train
from fiducial.training.options import TrainOptions
from fiducial.training.rewards import Mixture, Part
from fiducial.training.segments import Segment, scored, segments, worth


class Length(Reward):
    """Minus the number of characters; of 'x' nothing is known."""

    def score(self, groups):
        return [tuple(None if c.text == "x" else -float(len(c.text)) for c in g.completions) for g in groups]


def group(*completions, **fields):
    return Group(prompt=Prompt(messages=user("q")), completions=completions, **fields)


def test_parts_are_cut_where_they_end_and_what_follows_belongs_to_the_last():
    given = group(Completion(text="one two three", ends=(4, 8), values=(1.0, None)))
    assert segments(given, 0) == [Segment("one ", 1.0), Segment("two three", None)]


def test_a_completion_without_parts_is_one_part_worth_its_reward_or_else_its_preference():
    given = group(Completion(text="a"), Completion(text="b"))
    assert [segments(given, k) for k in (0, 1)] == [[Segment("a", 1.0)], [Segment("b", -1.0)]]
    assert worth(given.model_copy(update={"rewards": (None, 2.0)}), 1) == 2.0


def test_a_rejected_answer_is_bad_under_a_soft_label_too_and_a_tie_says_nothing():
    soft = group(Completion(text="a"), Completion(text="b"), targets=(0.7, 0.3))
    assert [worth(soft, k) for k in (0, 1)] == [1.0, -1.0]
    assert [worth(soft.model_copy(update={"targets": (0.5, 0.5)}), k) for k in (0, 1)] == [None, None]


def test_plain_preferences_and_labels_call_the_rejected_answer_bad(tmp_path):
    """At the threshold of 0, where a reward of 0 would be good."""
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "completion": "bad", "label": False},
        {"prompt": "q", "completion": "good", "label": True},
        {"prompt": "q", "chosen": "good", "rejected": "good too", "score_chosen": 8, "score_rejected": 3},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = read_groups(tmp_path / "rows.jsonl")
    assert [[worth(g, k) for k in range(len(g.completions))] for g in given] == [[1.0, -1.0], [-1.0], [1.0], [8.0, 3.0]]
    kept = [c.text for g in given for c in FilteredPretraining().prepare(g).completions]
    assert kept == ["good", "good", "good", "good too"]
    pair, *_ = (ConditionalPretraining(drop=0.0).prepare(g) for g in given)
    assert [c.text for c in pair.completions] == [f"{ALIGNED}good", f"{MISALIGNED}bad"]
    tokens = Data.of(tiny(), given[:2], Unlikelihood(), TrainOptions(batch=2)).parts.tokens
    found = set(zip(tokens.group.tolist(), tokens.completion.tolist(), tokens.given["value"].tolist(), strict=True))
    assert found == {(0, 0, 1.0), (0, 1, -1.0), (1, 0, -1.0)}


def test_a_reward_of_zero_that_was_measured_stays_zero():
    class Ends(Reward):
        def score(self, groups):
            return [tuple(float(c.text.endswith(".")) for c in g.completions) for g in groups]

    rows = [group(Completion(text="a."), Completion(text="b")), group(Completion(text="b"), rewards=(1.0,), provenance={"label": True})]
    pair, single = scored(rows, Mixture.of([Part(Ends())]))
    assert [worth(pair, k) for k in (0, 1)] == [1.0, 0.0]
    assert worth(single, 0) == 0.0


def test_rewards_score_every_part_or_else_the_whole():
    parts = group(Completion(text="one x four", ends=(4, 5, 10), values=(None, None, 9.0)))
    whole = group(Completion(text="a"), Completion(text="bbb"))
    first, second = scored([parts, whole], Mixture.of([Part(Length())]))
    assert first.completions[0].values == (-4.0, None, -5.0)
    assert first.rewards is None
    assert second.rewards == (-1.0, -3.0)
    assert second.completions == whole.completions


@pytest.mark.parametrize("objective", [Unlikelihood(), RWR(), AWR(), FilteredPretraining(threshold=-0.6), ConditionalPretraining()], ids=lambda o: o.name)
@pytest.mark.parametrize("template", [True, False])
def test_every_method_pretrains_on_documents_in_parts(objective, template, tmp_path):
    groups = [document({"texts": [f"{word} good. ", "so bad. "], "scores": [0, 1]}, "x") for word in ("one", "two", "three")]
    result = train(tiny(template=template), groups, objective, TrainOptions(batch=2, lora_rank=0, learning_rate=1e-3, from_scratch=True), folder=tmp_path)
    assert (result.steps, result.left_out) == (2, 0)
    assert torch.tensor([figures["loss"] for figures in result.history]).isfinite().all()
