"""`align/trl`: TRL's trainers run from TRL's own configuration, on a tiny model."""

import json
import logging
import sys
from statistics import fmean, pstdev

import pytest

import fiducial
from fiducial.core import registry
from fiducial.core.errors import ConfigError, MissingExtraError
from fiducial.core.records import user
from fiducial.core.run import Run
from fiducial.training.trl_config import ConfigFile

pytest.importorskip("trl")
pytest.importorskip("datasets")

FAST = "per_device_train_batch_size: 1\nmax_steps: 2\nlearning_rate: 1e-3\ngradient_checkpointing: false\n"
PAIRS = [{"prompt": f"why {n}?", "chosen": "because", "rejected": "no no no"} for n in range(4)]
ANSWERS = [{"prompt": f"why {n}?", "completion": "because"} for n in range(4)]
LABELS = [row | {"label": n % 2 == 0} for n, row in enumerate(ANSWERS)]
PROMPTS = [{"prompt": f"why {n}?", "wanted": n} for n in range(4)]
LORA = "use_peft: true\nlora_r: 2\nlora_target_modules: all-linear\n"


@pytest.fixture
def files(tmp_path):
    """Writes configuration and data; gives the words of the command."""

    def written(text, rows, *more):
        config, data = tmp_path / "config.yaml", tmp_path / "rows.jsonl"
        config.write_text(text, encoding="utf-8")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return ["align", "trl", "tiny", "--config", str(config), "--data", str(data), *more]

    return written


@pytest.mark.parametrize(
    ("text", "rows", "kind"),
    [
        (FAST + LORA + "beta: 0.2\n", PAIRS, "dpo"),
        (FAST, ANSWERS, "sft"),
        (FAST.replace("size: 1", "size: 2") + LORA, LABELS, "kto"),
    ],
    ids=["dpo with an adapter", "sft of all weights", "kto with an adapter"],
)
def test_a_run_of_trl_is_a_run_like_any_other(files, call, text, rows, kind):
    body, code = call(*files(text, rows))
    assert code == 0, body
    data, run = body["data"], Run.open(body["run"])
    assert (data["steps"], data["planned"], data["groups"]) == (2, 2, 4)
    assert [m.step for m in run.read_metrics()] == [1, 2]
    assert all("loss" in m.values for m in run.read_metrics())
    assert fiducial.open(data["model"]).fingerprint == data["fingerprint"]
    card = json.loads((run.path / "card.json").read_text())
    assert card["rules"]["drift"]["outcome"] in ("pass", "fail")
    assert card["verdict"] in ("pass", "fail", "not measured")
    assert "success" not in json.dumps(card)
    adapted, text = LORA in text, (run.path / "model" / "README.md").read_text()
    assert f'"trainer": "{kind}"' in text
    assert "| seed | 42 |" in text  # TRL's own
    assert card["about"]["seed"] == 42
    assert ("library_name: peft" in text) == adapted
    assert run.result("train")["fingerprint"] == data["fingerprint"]
    events, _ = call("log", "trace", data["model"])
    assert [e["kind"] for e in events["data"]["events"]] == ["train"]


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_a_policy_learns_from_a_function_that_is_named_by_its_import_path(files, call, tmp_path, monkeypatch, trainer):
    (tmp_path / "my_reward_for_trl.py").write_text(
        "def letters(completions, wanted, **_):\n    return [float(sum(map(str.isalpha, c))) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    text = FAST.replace("size: 1", "size: 2") + "num_generations: 2\nmax_completion_length: 4\nreward_funcs: [my_reward_for_trl.letters]\n"
    body, code = call(*files(text, PROMPTS, "--trainer", trainer))
    assert code == 0, body
    assert "reward" in body["data"]["last"]


def test_a_reward_model_of_trl_scores_like_ours(files, call):
    from fiducial.models.scorehead import scores

    body, code = call(*files(FAST, PAIRS, "--trainer", "reward"))
    assert code == 0, body
    model = fiducial.open(body["data"]["model"])
    assert (model.head.higher_is, model.fingerprint) == ("better", body["data"]["fingerprint"])
    assert scores(model, [[5, 6, 7]]).shape == (1,)
    chosen, rejected = (scores(model, [model.encode(user(row["prompt"]), row[side])[0] for row in PAIRS]).tolist() for side in ("chosen", "rejected"))
    assert model.head.scale == pytest.approx((fmean(chosen), pstdev(chosen + rejected)), rel=0.05)  # opened in bfloat16
    assert body["data"]["verdict"] == "not measured"


def test_an_interrupted_run_goes_on_from_the_checkpoint_of_trl(files, call, monkeypatch):
    from transformers import TrainerCallback

    from fiducial.align import trl as ours

    words = files(FAST + LORA + "beta: 0.2\nsave_steps: 1\n", PAIRS, "--override", "max_steps=3")
    whole, _ = call(*words)
    made, stopped = ours._trainer, []

    def interrupted(*args):
        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == 2 and not stopped:
                    stopped.append(True)
                    raise KeyboardInterrupt

        trainer = made(*args)
        trainer.add_callback(Stop())
        return trainer

    monkeypatch.setattr(ours, "_trainer", interrupted)
    body, code = call(*words)
    assert (code, stopped) == (130, [True])
    again, code = call("align", "trl", "--resume", body["run"])
    assert code == 0, again
    assert [m.step for m in Run.open(body["run"]).read_metrics()] == [1, 2, 3]  # only the third step was made again
    assert again["data"]["last"]["loss"] == pytest.approx(whole["data"]["last"]["loss"], rel=1e-4)
    assert again["data"]["fingerprint"] == whole["data"]["fingerprint"]
    assert again["data"]["steps"] == 3


def test_a_resumed_run_does_not_go_on_with_another_configuration(files, call, tmp_path):
    body, _ = call(*files(FAST, ANSWERS))
    (tmp_path / "config.yaml").write_text(FAST + "seed: 5\n")
    again, code = call("align", "trl", "--resume", body["run"])
    assert code == 2
    assert "has changed since it began" in again["error"]["message"]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("learning_rte: 1\n", "config.yaml:1: TRL has no field 'learning_rte'", "did you mean 'learning_rate'?"),
        ("beta: 0.1\nmax_steps: 1\nreward_funcs: [a.b]\ntrainer: dpo\n", "config.yaml:3: trl dpo has no field 'reward_funcs'", ""),
        ("trainer: dpo\nnum_train_epochs: many\n", "config.yaml:2: num_train_epochs: invalid", ""),
        ("use_peft: true\nmax_steps: 1\ntrainer: reward\n", "config.yaml:1: the adapter of a reward model is of the task SEQ_CLS", "lora_task_type: SEQ_CLS"),
        ("trainer: ppo\n", "config.yaml:1: 'ppo' is no trainer of TRL that is run here", "known: dpo, sft, kto, reward, grpo, rloo"),
        ("max_steps: 1\n", "config.yaml does not say which trainer", "give --trainer: dpo, reward"),
        ("loss_type: nonsense\ntrainer: dpo\n", "nonsense", ""),
        ("- 1\n", "is a list of `field: value` lines", ""),
    ],
)
def test_what_is_wrong_in_the_file_is_said_with_its_place(files, call, text, message, hint):
    body, code = call(*files(text, PAIRS))
    assert (code, body["error"]["kind"]) == (2, "config"), body
    assert message in body["error"]["message"]
    assert hint in body["error"]["hint"]


def test_a_trainer_that_is_not_known_is_answered_with_those_that_are(files, call):
    body, code = call(*files(FAST, PAIRS, "--trainer", "ppo"))
    assert code == 2
    assert "'dpo', 'sft', 'kto', 'reward', 'grpo', 'rloo'" in body["error"]["message"]
    with pytest.raises(ConfigError, match="known: dpo, sft, kto, reward, grpo, rloo"):
        registry.create("align/trl", {"trainer": "ppo"})


def test_data_sets_of_the_hub_are_not_fetched_and_nothing_to_train_on_is_said(files, call):
    words = files("dataset_name: trl-lib/ultrafeedback_binarized\n", PAIRS)
    body, code = call(*words[:5])
    assert code == 2
    assert "are not fetched" in body["error"]["message"]
    files("beta: 0.1\n", PAIRS)
    body, code = call(*words[:5])
    assert "nothing to train on" in body["error"]["message"]
    assert "give --config FILE" in call("align", "trl", "tiny")[0]["error"]["hint"]


def test_model_and_data_of_the_file_are_taken_where_the_command_names_none(files):
    words = files("model_name_or_path: org/model\nmodel_revision: v2\ndataset_name: rows.jsonl\n", PAIRS)
    method = registry.create("align/trl", {"config": words[4]})
    assert method.usual() == {"model": "hf:org/model@v2", "data": "rows.jsonl"}


def test_the_trainer_is_the_only_one_with_such_fields_and_columns(tmp_path):
    path = tmp_path / "c.yaml"
    cases = [
        ("beta: 0.1", PAIRS, "dpo"),
        ("center_rewards_coefficient: 0.1", PAIRS, "reward"),
        ("packing: false", ANSWERS, "sft"),
        ("beta: 0.1", LABELS, "kto"),
    ]
    for text, rows, kind in cases:
        path.write_text(text)
        plan = ConfigFile.read(str(path)).plan(None, rows[0].keys(), tmp_path, evaluates=False)
        assert plan.kind == kind


def test_what_would_leave_the_machine_is_switched_off_and_said(tmp_path, caplog):
    path = tmp_path / "c.yaml"
    path.write_text("beta: 0.1\nreport_to: wandb\npush_to_hub: true\nhub_token: hf_secret\neval_strategy: steps\nenv:\n  WANDB_PROJECT: mine\n")
    with caplog.at_level(logging.WARNING):
        plan = ConfigFile.read(str(path)).plan("dpo", {"chosen", "rejected"}, tmp_path, evaluates=False)
    assert plan.args.report_to == []
    assert plan.args.push_to_hub is False
    assert plan.settings == {"trainer": "dpo", "seed": 42, "beta": 0.1, "report_to": "none", "push_to_hub": False, "eval_strategy": "no"}
    assert plan.environment == {"WANDB_PROJECT": "mine"}
    assert [r.getMessage().split(": ")[1].split()[0] for r in caplog.records] == ["report_to", "push_to_hub", "eval_strategy"]
    assert f"{path}:2" in caplog.records[0].getMessage()


def test_without_trl_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("beta: 0.1")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match="'trl', which is not installed") as caught:
        ConfigFile.read(str(path))
    assert caught.value.hint == 'in the folder of the project: pip install -e ".[train]"'


def test_groups_of_a_run_are_written_in_columns_that_trl_reads(files, call):
    from fiducial.core.records import Completion, Group, Prompt, user

    made = Run.create("align/x", {}, {}, 0)
    with made:
        for n in range(2):
            group = Group(prompt=Prompt(messages=user(f"why {n}?")), completions=(Completion(text="so"), Completion(text="no")), rewards=(1.0, 0.0))
            made.lines("groups", group.__class__).append(group)
    words = files(FAST + LORA + "beta: 0.1\n", PAIRS)
    body, code = call(*words[:-1], made.id)
    assert code == 0, body
    assert body["data"]["groups"] == 2


def test_a_run_with_special_tokens_and_a_secret_goes_on_and_writes_no_secret(files, call):
    words = files(FAST, ANSWERS, "--override", "eos_token=<|im_end|>", "--override", "hub_token=hf-pw-1")
    body, code = call(*words)
    assert code == 0, body
    again, code = call("align", "trl", "--resume", body["run"])
    assert code == 0, again
    assert again["data"]["fingerprint"] == body["data"]["fingerprint"]
    made = Run.open(body["run"]).path
    assert not [f for f in made.rglob("*.json*") if "hf-pw-1" in f.read_text()]
    assert not list((made / "stages").glob("*.aside-*"))


@pytest.mark.parametrize(("option", "value"), [("--dtype", "float32"), ("--device", "cpu")])
def test_how_the_model_is_opened_is_said_in_fields_of_trl(files, call, option, value):
    body, code = call(*files(FAST, ANSWERS, option, value))
    assert code == 2
    assert f"{option} says nothing to align/trl" in body["error"]["message"]
    assert "--override" in body["error"]["hint"]


def test_packed_rows_are_not_left_out(files, call):
    body, code = call(*files(FAST.replace("max_steps: 2", "max_steps: 1") + "packing: true\npacking_strategy: wrapped\nmax_length: 64\n", ANSWERS))
    assert code == 0, body
    assert (body["data"]["groups"], body["data"]["left_out"]) == (4, 0)


def test_without_a_gpu_the_default_is_float32_also_where_the_file_says_so(tmp_path):
    path = tmp_path / "c.yaml"
    for text, bf16 in (("beta: 0.1\n", False), ("beta: 0.1\nuse_cpu: true\n", False), ("beta: 0.1\nuse_cpu: true\nbf16: true\n", True)):
        path.write_text(text)
        assert ConfigFile.read(str(path)).plan("dpo", {"chosen", "rejected"}, tmp_path, evaluates=False).args.bf16 is bf16
