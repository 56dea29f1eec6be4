"""Several processes train as one does, with whole weights and with weights that are shared out over them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from fiducial.core.errors import ConfigError
from fiducial.training import processes, sharding
from fiducial.training.processes import accelerator_on

SCRIPT = Path(__file__).with_name("trainers.py")
CONFIG = Path(__file__).resolve().parents[2] / "docs" / "guides" / "accelerate-fsdp2.yaml"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--main_process_port", "0")

WHOLE = (
    *("dpo", "dpo@again", "dpo@online", "sft@full", "sft@top", "sft@noise", "sft@noise@again", "dft"),
    *("kto", "exo", "plackett_luce", "ipo", "hinge", "robust_dpo", "orpo", "simpo", "apo", "dpop", "cpo"),
    *("rwr", "awr", "unlikelihood", "filtered_pretraining", "conditional_pretraining"),
    *("reward_model", "cost_model", "process_reward", "rloo", "rloo@cost", "grpo", "ppo", "ppo@cost"),
)
SHARED_OUT = (
    "dpo",
    "dpo@again",
    "dpo@rows",
    "exo",
    "orpo",
    "process_reward",
    "cost_model",
    "sft@full@again",
    "sft@top",
    "sft@noise",
    "sft@full",
    "sft@full@bfloat16",
    "kto",
    "reward_model",
    "awr@full",
    "rloo",
)


def launched(launcher, *words, folder=None, code=0):
    """What two processes on CPUs say and leave, which end with this code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *launcher, *map(str, words)], capture_output=True, text=True, check=False, env=environment, timeout=600, cwd=folder)
    assert done.returncode == code, done.stderr[-40_000:]  # each process says its own, the one that failed first at the beginning
    return done


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Where two processes left what came of every trainer with whole weights, all in one pair, since a start takes 20 seconds."""
    folder = tmp_path_factory.mktemp("two")
    launched(TORCHRUN, SCRIPT, folder / "out.json", folder, *WHOLE, "dpo@stopped")
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What the first of two processes says that went on with a training which both were killed in, in the third step."""
    folder = tmp_path_factory.mktemp("killed")
    words = (SCRIPT, folder / "out.json", folder, "dpo@killed")
    died = launched(TORCHRUN, *words, code=1)
    assert "Signal 9 (SIGKILL)" in died.stderr, died.stderr[-5000:]
    assert [p.name for p in (folder / "dpo@killed").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / "out.json").exists()
    launched(TORCHRUN, *words)
    return json.loads((folder / "out.json").read_text())["dpo@killed"]


@pytest.fixture(scope="module")
def two(left):
    """What the first of them says."""
    return json.loads((left / "out.json").read_text())


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory):
    """What both say of the same with weights that are shared out, by the configuration that the guide gives."""
    folder = tmp_path_factory.mktemp("parts")
    launched(ACCELERATE, SCRIPT, folder / "out.json", folder, *SHARED_OUT)
    return [json.loads((folder / name).read_text()) for name in ("out.json", "out.json.1")]


@pytest.fixture(scope="module")
def parts(shared_out):
    """What the first of them says."""
    return shared_out[0]


def assert_alike(one, other, *, rel=1e-5, weights=2e-5):
    """Tokens, every figure of every step, and every weight."""
    assert one["tokens"] == other["tokens"]
    for step, same in zip(one["history"], other["history"], strict=True):
        assert step["loss"] == pytest.approx(same["loss"], rel=rel, abs=1e-6)
        # before the first update policy and reference are one, and which answer is ahead is a matter of rounding
        ties = {"accuracy": same["accuracy"]} if step["step"] == 1 and "accuracy" in same else {}
        # by ranks, which rounding may turn around where two scores are nearly equal
        ranked = {name: value for name, value in same.items() if name.startswith("length_correlation")}
        assert {name: step[name] for name in ranked} == pytest.approx(ranked, abs=0.1, nan_ok=True)
        assert step | ties | ranked == pytest.approx(same, rel=100 * rel, abs=100 * rel, nan_ok=True)
    assert one["weights"].keys() == other["weights"].keys()
    for name, values in one["weights"].items():
        assert values == pytest.approx(other["weights"][name], abs=weights), name


@pytest.mark.slow
@pytest.mark.parametrize("trainer", WHOLE)
def test_two_processes_train_as_one_does(trainers, two, tmp_path, trainer):
    """7 groups in batches of 3, or 3 prompts in batches of 2: in the last step one process has nothing to do."""
    assert_alike(two[trainer], trainers.found(*trainers.go(trainer, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", WHOLE)
def test_all_processes_have_the_trained_model_afterwards(left, two, trainer):
    assert json.loads((left / "out.json.1").read_text())[trainer] == two[trainer]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["two", "parts"], ids=["whole", "shared out"])
def test_a_training_of_two_processes_resumes_exactly(request, weights):
    found = request.getfixturevalue(weights)
    one, other = found["dpo"], found["dpo@again"]
    assert one["fingerprint"] == other["fingerprint"]
    assert one["history"] == other["history"]


@pytest.mark.slow
def test_kill_minus_nine_of_both_processes_ends_in_the_weights_of_a_run_that_was_not_killed(two, killed):
    assert killed == two["dpo"] | {"made": [3, 4, 5]}


@pytest.mark.slow
def test_what_two_processes_began_one_finishes(trainers, left, two):
    assert len(two["dpo@stopped"]["history"]) == 1
    assert_alike(trainers.found(*trainers.go("dpo@stopped", left / "dpo@stopped", again=True)), two["dpo"])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [t for t in SHARED_OUT if "bfloat16" not in t and t != "rloo"])
def test_weights_that_are_shared_out_train_as_whole_ones_do(trainers, parts, tmp_path, trainer):
    """Adapters and all weights; heads; mismatched pairs; groups over several rows, of which the processes have different numbers."""
    assert_alike(parts[trainer], trainers.found(*trainers.go(trainer, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [t for t in SHARED_OUT if t != "rloo"])
def test_each_process_has_about_half_of_what_is_shared_out(shared_out, two, trainer):
    first, second = (said[trainer]["shared_out"] for said in shared_out)
    assert first.keys() == second.keys() == {name for name in shared_out[0][trainer]["weights"] if not name.endswith("head")}
    for name, (here, whole) in first.items():
        assert here + second[name][0] == whole == second[name][1]
    held = [sum(here for here, _ in said.values()) for said in (first, second)]
    assert min(held) > 0.45 * sum(held) > 0
    assert two["dpo"]["shared_out"] == {}


@pytest.mark.slow
def test_shared_out_masters_move_bfloat16_weights(trainers, parts, tmp_path):
    assert_alike(parts["sft@full@bfloat16"], trainers.found(*trainers.go("sft@full@bfloat16", tmp_path)), rel=1e-2, weights=2e-2)


@pytest.mark.slow
def test_learning_from_samples_is_refused_where_weights_are_shared_out(parts):
    assert parts["rloo"] == {"refused": "a model whose weights are shared out cannot be sampled from while it learns"}


@pytest.mark.slow
def test_the_command_makes_one_run_whose_model_opens_alone(tmp_path):
    rows = [{"prompt": f"question {n}", "chosen": "no" * n, "rejected": "yes"} for n in range(1, 6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ("align", "dpo", "tiny", "--data", "pairs.jsonl", "--batch", "2", "--learning-rate", "1e-3", "--json", "--runs", "runs")
    done = launched(ACCELERATE, "-m", "fiducial", *words, folder=tmp_path)
    body = json.loads(done.stdout.strip().splitlines()[-1])
    (run,) = (tmp_path / "runs").glob("*/run.json")
    assert (body["run"], body["data"]["steps"]) == (run.parent.name, 3)
    assert json.loads(run.read_text())["status"] == "done"
    from fiducial.models import open as opening

    assert opening.open(str(run.parent / "model")).fingerprint == body["data"]["fingerprint"]


@pytest.fixture
def environment(monkeypatch):
    """Options of FSDP as accelerate hands them on, those of the guide's configuration but for the given."""

    def given(**changes):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        said = config["fsdp_config"] | {"mixed_precision": config["mixed_precision"]} | changes
        for variable, (option, _, _) in sharding.NEEDED.items():
            monkeypatch.setenv(variable, str(said[option]))

    return given


def test_weights_are_shared_out_when_accelerate_is_told_so_and_there_is_someone_to_share_with(environment, monkeypatch):
    environment()
    assert sharding.wanted(SimpleNamespace(num_processes=2))
    assert not sharding.wanted(SimpleNamespace(num_processes=1))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert not sharding.wanted(SimpleNamespace(num_processes=2))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("fsdp_version", 1),
        ("fsdp_offload_params", True),
        ("fsdp_activation_checkpointing", True),
        ("fsdp_reshard_after_forward", False),
        ("fsdp_cpu_ram_efficient_loading", True),
        ("mixed_precision", "bf16"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused_by_name(environment, option, value):
    environment(**{option: value})
    with pytest.raises(ConfigError, match=f"{option} is {str(value).lower()}"):
        sharding.wanted(SimpleNamespace(num_processes=2))


def test_connections_to_other_processes_end_before_python_does(monkeypatch):
    registered = []
    monkeypatch.setattr(processes.atexit, "register", registered.append)
    monkeypatch.setattr("accelerate.Accelerator", lambda cpu: SimpleNamespace(num_processes=2))
    processes._leave_in_the_end.cache_clear()
    for _ in range(2):
        accelerator_on(torch.device("cpu"))
    processes._leave_in_the_end.cache_clear()
    assert registered == [processes.leave]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    for _ in range(2):
        processes.leave()
        assert not torch.distributed.is_initialized()


def test_a_process_that_follows_keeps_no_run(monkeypatch, tmp_path):
    from fiducial.core.run import Run

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="loop runs in one process"):
        Run.create("loop", {}, {}, 0, root=tmp_path)
    monkeypatch.setenv("RANK", "0")
    assert Run.create("loop", {}, {}, 0, root=tmp_path).id


def test_a_model_on_the_cpu_can_be_trained_after_one_on_another_device():
    from accelerate.state import AcceleratorState, PartialState

    assert accelerator_on(torch.device("cpu")).device.type == "cpu"
    for state in (PartialState, AcceleratorState):  # as training on a GPU leaves them
        state._shared_state["device"] = torch.device("cuda")
    assert accelerator_on(torch.device("cpu")).device.type == "cpu"
