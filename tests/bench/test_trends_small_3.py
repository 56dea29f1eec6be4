"""The trends of training with feedback on a tiny model: that they run and record, and that their text is what they say."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from fiducial.core.records import Completion, Group, Prompt, user

TRENDS = Path(__file__).resolve().parents[2] / "bench" / "trends"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages that the benchmarks import


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name as it is when run; nothing of it stays imported."""
    monkeypatch.syspath_prepend(str(TRENDS))
    before, path = torch.get_num_threads(), list(sys.path)
    yield importlib.import_module
    torch.set_num_threads(before)
    sys.path[:] = path
    for name in {"protocol", *(file.stem for file in TRENDS.glob("*.py"))} & set(sys.modules):
        del sys.modules[name]


def test_four_ways_of_pretraining_are_compared(script, tmp_path):
    name = "conditional_pretraining"
    assert script(name).main(["--small", "--seeds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["pretraining"] for row in found["rows"]] == ["MLE", "filtering", "conditional", "MLE, then unlikelihood"]
    assert len(found["directions"]) == 7
    assert {d["holds"] for d in found["directions"]} <= {"yes", "no", "not decided"}


def test_a_tenth_of_the_sentences_insults_and_each_is_scored_as_it_is(script):
    trend = script("conditional_pretraining")
    groups = trend.written(2000, trend.Sizes(), random.Random(0))
    parts = [
        (g.completions[0].text[start:end], value)
        for g in groups
        for start, end, value in zip((0, *g.completions[0].ends), g.completions[0].ends, g.completions[0].values, strict=False)
    ]
    bad = trend.insults([text for text, value in parts if value < 0])
    good = trend.insults([text for text, value in parts if value == 0])
    assert (bad.value, good.value) == (1.0, 0.0)
    assert bad.n + good.n == len(parts)
    assert 0.08 < bad.n / len(parts) < 0.12


def test_held_out_text_has_no_insults_and_every_word_is_known(script):
    trend = script("conditional_pretraining")
    texts = [g.completions[0].text for g in trend.written(100, trend.Sizes(), random.Random(1), insults=False)]
    assert trend.insults(texts).hits == 0
    assert {word for text in texts for word in text.split()} <= set(trend.words())
    assert trend.blank(trend.SMALL).chat.decode(trend.blank(trend.SMALL).encode((), texts[0])[0]) == texts[0].strip()


def test_four_ways_of_learning_from_marked_answers_are_compared(script, tmp_path):
    name = "conditional_finetuning"
    assert script(name).main(["--small", "--seeds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["learnt by"] for row in found["rows"]] == ["before", *script(name).OBJECTIVES]
    assert len(found["directions"]) == 6


def test_spoilt_answers_insult_and_are_marked_and_the_others_neither(script):
    trend = script("conditional_finetuning")
    prompts = [Prompt(messages=user(f"question {n}")) for n in range(40)]
    clean = [Group(prompt=p, completions=(Completion(text=f"Answer {n}.", finish="length"),)) for n, p in enumerate(prompts)]
    made = [g.completions[0] for g in trend.material(clean, trend.Sizes(), 1)]
    bad = [c for c in made if c.values == (-1.0,)]
    assert len(bad) == round(trend.Sizes().spoilt * 40)
    assert trend.insulting([c.text for c in bad]) == [len(bad), len(bad)]
    assert [c.text for c in made if c.values == (0.0,)] == [c.text for c, now in zip((g.completions[0] for g in clean), made, strict=True) if now not in bad]
    assert all(c.ends == (len(c.text),) and c.finish == "length" for c in made)
    led = trend.after_rudeness(prompts, clean, random.Random(0))
    assert all(trend.insulting([talk[-2].content]) == [1, 1] and talk[-1] == p.messages[-1] for talk, p in zip(led, prompts, strict=True))
