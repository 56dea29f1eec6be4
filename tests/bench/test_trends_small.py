"""The trend scripts on a tiny random model: that they run, resume and record; what they find there means nothing."""

import importlib
import json
import sys
from argparse import Namespace
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


def small(script, name, tmp_path):
    """The record of a script's small run."""
    assert script(name).main(["--small", "--seeds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.md").read_text().startswith(f"# {name}\n")
    assert not (tmp_path / f"{name}.partial.jsonl").exists()
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_exo_against_dpo_compares_all_four_up_to_the_distance_that_all_reach(script, tmp_path):
    found = small(script, "exo_against_dpo", tmp_path)
    assert len(found["directions"]) == 3
    for seed in found["seeds"]:
        assert set(seed["points"]) == {"DPO", "EXO-pref", "DPO-rw", "EXO-rw"}
        assert {len(points) for points in seed["points"].values()} == {2}
        assert all(max(p["kl"] for p in points) >= seed["common_kl"] > 0 for points in seed["points"].values())


def test_reward_within_kl_holds_both_methods_to_the_budget(script, tmp_path):
    found = small(script, "reward_within_kl", tmp_path)
    assert [row["method"] for row in found["rows"]] == ["GRPO", "PPO"]
    assert all(seed[method]["steps"] == 2 and not seed[method]["stop"] for seed in found["seeds"] for method in ("GRPO", "PPO"))


def test_overoptimisation_scores_a_pool_by_members_and_ensembles(script, tmp_path):
    found = small(script, "overoptimisation", tmp_path)
    for seed in found["seeds"]:
        assert len(seed["members"]) == 2
        assert len(seed["chosen_by"]) == 5
        assert all(curve["gold"][0] == pytest.approx(0, abs=1e-6) for curve in seed["chosen_by"].values())  # the best of one is any answer
        truth = seed["chosen_by"]["the true reward itself"]
        assert truth["gold"] == truth["proxy"] == sorted(truth["gold"])
        assert truth["right"] == [1.0]


def test_mean_reward_at_equal_distance_is_the_area_under_straight_lines(script):
    area = script("exo_against_dpo").at_equal_distance
    points = [{"kl": 16.0, "reward": 3.0}, {"kl": 4.0, "reward": 1.0}]  # at distances 4 and 2
    assert area(points, 0.0, 2.0) == 0.5
    # from 2 to 3 the line rises from 1 to 2: (1 + 1.5) / 3
    assert area(points, 0.0, 3.0) == pytest.approx(2.5 / 3)


def test_plain_words_are_short(script):
    plain = script("gold").plain
    # 1 + 2 + 2 + 3 letters in four words; a word's digits and marks do not count; longer than ten letters is as bad as no answer
    assert plain(["I am so sad!", "extraordinary circumstances prevail", "two words", ""]) == [-2.0, -10.0, -10.0, -10.0]


def test_a_direction_is_decided_by_the_interval_over_seeds(script):
    decided = script("common").decided
    assert [decided(d) for d in ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -1.0, 0.1])] == ["yes", "no", "not decided"]
    assert decided([0.1, 0.1]) == "not decided"  # without a spread nothing is known


def test_seeds_that_were_done_are_not_done_again_unless_the_settings_changed(script, tmp_path):
    common, done = script("common"), []
    chosen = Namespace(out=tmp_path, small=True, seeds=2)

    def run(seed):
        done.append(seed)
        return {"value": seed}

    common.per_seed("x", chosen, {"size": 1}, run)
    with (tmp_path / "x.partial.jsonl").open("a") as file:
        file.write('\n{"seed": 2, "cut')  # a line that a killed run left
    assert [found["value"] for found in common.per_seed("x", chosen, {"size": 1}, run)] == [1, 2]
    assert done == [1, 2]
    common.per_seed("x", chosen, {"size": 2}, run)
    assert done == [1, 2, 1, 2]
    assert [found["seed"] for found in common.per_seed("x", chosen, {"size": 2}, run, first=2)] == [2, 3]
