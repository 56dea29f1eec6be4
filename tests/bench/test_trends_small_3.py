"""The trend of pretraining with feedback on a tiny model: that it runs and records, and that its language is what it says."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

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
