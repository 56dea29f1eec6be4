"""The benchmarks on a tiny random model: token counts and agreement with the peers, never times."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
NAMES = {"protocol", "twins", "multiple_choice", "dpo_step", "group_step", "align", "samples", "head", "overhead", "sweep"}

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own warnings


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name as it is when run; nothing of it stays imported."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(before)
    for name in NAMES & set(sys.modules):
        del sys.modules[name]


def small(script, name, tmp_path):
    """The record of a script's small run, which ended well."""
    assert script(name).main(["--small", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.md").read_text().startswith(f"# {name}\n")
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert all(case["valid"] and not case["ratios"] for case in record["cases"])
    return record


def counts(record):
    return [case["counts"] for case in record["cases"]]


def test_multiple_choice_feeds_each_prompt_once_and_agrees_with_lm_eval(script, tmp_path):
    pytest.importorskip("lm_eval")
    short, _, single = counts(small(script, "multiple_choice", tmp_path))
    assert short["items"] == 2
    assert short["unique tokens"] < short["naive tokens"] / 2.5
    assert single["scored tokens"] == 8  # 2 questions, 4 answers of one token
    assert single["unique tokens"] * 4 == single["naive tokens"]  # such answers cost no token of their own


def test_a_dpo_step_has_the_loss_and_gradient_of_trl(script, tmp_path):
    pytest.importorskip("trl")
    found = small(script, "dpo_step", tmp_path)
    assert [case["case"].split(",")[0] for case in found["cases"]] == ["lora", "lora", "full", "full"]
    for count in counts(found):
        assert count["unique tokens"] < count["padded tokens"]
    long_prompt, long_answer = counts(found)[:2]
    assert long_prompt["padded tokens"] / long_prompt["unique tokens"] > long_answer["padded tokens"] / long_answer["unique tokens"]


def test_a_group_step_has_the_loss_and_gradient_of_trl(script, tmp_path):
    pytest.importorskip("trl")
    first = counts(small(script, "group_step", tmp_path))[0]
    assert first["K"] == 8
    assert first["unique tokens"] == 32 + first["scored tokens"] - 8  # the prompt once; last tokens are only predicted


def test_a_step_of_each_method_has_the_loss_and_gradient_of_trl(script, tmp_path):
    pytest.importorskip("trl")
    found = small(script, "align", tmp_path)
    seen = {case["case"]: case["counts"] for case in found["cases"]}
    assert {name.split(",")[0] for name in seen} == {"dpo", "kto", "reward_model", "grpo", "sft", "sft_packed"}
    saved = {name: 1 - count["unique tokens"] / count["naive tokens"] for name, count in seen.items()}
    for name in ("kto", "sft", "sft_packed"):
        assert saved[f"{name}, 4:1 (32:8)"] == saved[f"{name}, 1:4 (8:32)"] == 0
    assert saved["grpo, 4:1 (32:8)"] > saved["dpo, 4:1 (32:8)"] > 0.3
    assert saved["reward_model, 4:1 (32:8)"] > 0.3


def test_some_methods_alone_replace_no_record(script, tmp_path, capsys):
    pytest.importorskip("trl")
    before = (BENCH / "results" / "align.md").exists()
    assert script("align").main(["--small", "--only", "sft", "--threads", "1"]) == 0
    assert {line.split(",")[0] for line in capsys.readouterr().out.splitlines()} == {"sft"}
    assert (BENCH / "results" / "align.md").exists() == before


def test_packed_rows_of_trl_keep_documents_apart_on_a_cpu(script):
    pytest.importorskip("trl")
    align, protocol = script("align"), script("protocol")
    loaded, method = protocol.models(small=True), align.METHODS["sft_packed"]
    asked = align.draw(method, protocol.Text(loaded.tokenizer), align.SMALL[0])
    with align.sides_of(method, loaded.modules["float32"], loaded.tokenizer, names=["TRL"]) as sides:
        together, *alone = (sides["TRL"].ready(some)() for some in (asked, *([a] for a in asked)))
    tokens = [len(a.completions[0]) for a in asked]
    assert together == pytest.approx(sum(n * loss for n, loss in zip(tokens, alone, strict=True)) / sum(tokens), rel=1e-5)


def test_samples_have_the_log_probabilities_of_a_plain_forward_pass_and_greedy_ones_are_those_of_generate(script, tmp_path):
    one, many = counts(small(script, "samples", tmp_path))
    assert (one["samples"], one["greedy equal"]) == (8, "1 of 1")
    assert (many["samples"], many["greedy equal"]) == (2, "2 of 2")


def test_the_selected_head_agrees_with_all_positions_and_with_trl(script, tmp_path):
    pytest.importorskip("trl")
    assert len(small(script, "head", tmp_path)["cases"]) == 2


def test_nothing_shared_means_as_many_tokens_as_without_sharing(script, tmp_path):
    for count in counts(small(script, "overhead", tmp_path)):
        assert count["unique tokens"] == count["naive tokens"]


def test_every_ratio_and_number_of_completions_is_swept_and_both_sides_agree(script, tmp_path):
    found = small(script, "sweep", tmp_path)
    (rows,) = found["tables"].values()
    assert [(row["rho"], row["K"], row["S"]) for row in rows] == [("4", 1, "1.00"), ("4", 4, "2.50"), ("0.25", 1, "1.00"), ("0.25", 4, "1.18")]
    alone, shared, *_ = counts(found)
    assert alone["unique tokens"] == alone["padded tokens"]
    assert shared["unique tokens"] < shared["padded tokens"] / 2


def test_a_ratio_that_fell_by_more_than_fifteen_per_cent_is_named(script):
    protocol = script("protocol")

    def record(**ratios):
        return {"cases": [{"case": n, "dtype": "f", "ratios": [{"side": "a", "over": "b", "wall": {"median": r}}]} for n, r in ratios.items()]}

    assert protocol.fallen(record(one=1.71, two=5.0), record(one=2.0, other=9.0)) == (1, [])
    assert protocol.fallen(record(one=1.69), record(one=2.0)) == (1, ["one, f: a over b was 2.0x and is 1.69x"])


def test_a_ratio_is_the_median_of_the_ratios_within_repetitions(script):
    protocol = script("protocol")
    peer, ours = protocol.Times([4.0, 6.0, 9.0], [8.0, 8.0, 8.0]), protocol.Times([2.0, 2.0, 2.0], [4.0, 4.0, 2.0])
    case = protocol.Case("c", "float32", [protocol.Claim("ours", "peer", 3.5)], {"peer": peer, "ours": ours}, 0.0, 1e-4, "x")
    (ratio,) = case.record()["ratios"]
    assert ratio["wall"] == {"median": 3.0, "low": 2.0, "high": 4.5}
    assert ratio["cpu"] == {"median": 2.0, "low": 2.0, "high": 4.0}
    assert (ratio["reached"], ratio["waited"]) == (False, 0)


def test_a_target_is_reached_only_if_the_processor_time_reaches_it_too(script):
    protocol = script("protocol")
    times = {"peer": protocol.Times([90.0], [3.0]), "ours": protocol.Times([2.0], [2.0])}  # the peer stood still for 87 seconds
    case = protocol.Case("c", "float32", [protocol.Claim("ours", "peer", 2.0)], times, 0.0, 1e-4, "x")
    (ratio,) = case.record()["ratios"]
    assert (ratio["wall"]["median"], ratio["cpu"]["median"]) == (45.0, 1.5)
    assert (ratio["reached"], ratio["waited"]) == (False, 1)


def test_a_verdict_needs_all_repetitions(script):
    protocol = script("protocol")

    def verdict(*seconds):
        times = {"peer": protocol.Times([2.0, 2.0], [2.0, 2.0]), "ours": protocol.Times(list(seconds), [1.9, 1.9])}
        return protocol.Case("c", "float32", [protocol.Claim("ours", "peer")], times, 0.0, 1e-4, "x").record()["ratios"][0]["verdict"]

    assert verdict(1.0, 1.9) == "faster"
    assert verdict(1.0, 2.1) == verdict(2.1, 2.2) == "equal within range"  # the processor's seconds say otherwise


@pytest.mark.parametrize("difference", [1e-4, float("nan"), float("inf")])
def test_a_ratio_whose_outputs_differ_counts_for_nothing(script, difference):
    protocol = script("protocol")
    times = {"peer": protocol.Times([4.0], [4.0]), "ours": protocol.Times([1.0], [1.0])}
    assert protocol.Case("c", "float32", [protocol.Claim("ours", "peer", 2.0)], times, 9e-5, 1e-4, "x").record()["ratios"][0]["reached"]
    case = protocol.Case("c", "float32", [protocol.Claim("ours", "peer", 2.0)], times, difference, 1e-4, "x")
    assert case.record()["ratios"][0]["reached"] is False
    bench = protocol.Bench("b", Namespace(small=True, note="", out=None, threads=1, repetitions=1, keep_memory=False, compare=False))
    bench.add(case)
    assert bench.finish() == 1


def test_runs_in_processes_of_their_own_become_one_record(script, tmp_path):
    protocol = script("protocol")

    def bench(out=None):
        return protocol.Bench("b", Namespace(small=True, note="", out=out, threads=1, repetitions=1, keep_memory=False, compare=False))

    whole = bench(tmp_path)
    for name, difference in (("first", 0.0), ("second", 1.0)):
        part = bench()
        part.add(protocol.Case(name, "float32", [], {}, difference, 1e-4, "x"))
        part.tables["peaks"] = [{"case": name}]
        whole.take(part.record())
    assert whole.finish() == 1  # the second is not valid
    record = json.loads((tmp_path / "b.json").read_text())
    assert [case["case"] for case in record["cases"]] == ["first", "second"]
    assert record["tables"] == {"peaks": [{"case": "first"}, {"case": "second"}]}


def test_sides_are_run_in_turn_and_in_another_order_every_time(script):
    run = []
    times, given = script("protocol").interleave({"a": lambda: run.append("a") or 1, "b": lambda: run.append("b") or 2}, 3)
    assert "".join(run) == "ab" + "ab" + "ba" + "ab"  # a warm-up, then three repetitions
    assert given == {"a": 1, "b": 2}
    assert [len(t.wall) for t in times.values()] == [3, 3]
    run.clear()
    script("protocol").interleave({name: lambda name=name: run.append(name) for name in "abc"}, 6, warm=False)
    assert len({tuple(run[at : at + 3]) for at in range(0, 18, 3)}) == 6


def test_the_tolerance_of_a_sum_grows_with_its_length(script):
    assert script("protocol").summed_tolerance(10) == pytest.approx(2e-4)
