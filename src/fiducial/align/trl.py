"""A training run of TRL, from the configuration that TRL reads.

What it does: trains what `trl dpo|sft|kto|reward|grpo|rloo --config FILE` would train, with TRL's own trainer, and keeps it as every run is kept:
              figures per step, checkpoints, report card, model card, ledger.
Use it when:  a TRL configuration exists and its result is to be measured, compared and recorded. For a new run take align/dpo, align/sft, ...
Defaults:     TRL's. Where the file is silent: figures of every step, a checkpoint every 25 steps of which the last is kept, and float32 where
              there is no GPU, or use_cpu is true.
Limits:       one process. Nothing leaves the machine: report_to and push_to_hub are switched off, data sets of the hub are not fetched, code of
              models is not run. A reward model is kept whole, without its adapter; its pairs are made into tokens by our chat format, so that
              it learns at the token where its score is read.
Source:       TRL 1.12 or later, von Werra et al. 2020, https://github.com/huggingface/trl; needs the extra `train`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

from fiducial.core.errors import ConfigError, DataError
from fiducial.core.roles import Trainer
from fiducial.training.trl_config import KINDS, ConfigFile, Plan, first_line

if TYPE_CHECKING:
    from fiducial.models.local import LocalModel
    from fiducial.training.loop import Report, TrainResult


@final
@dataclass(frozen=True, slots=True)
class TRL(Trainer):
    """TRL's trainers, as one method."""

    config: str = ""
    """TRL's configuration file, as `trl dpo --config FILE` reads it; needed."""
    trainer: Literal["dpo", "sft", "kto", "reward", "grpo", "rloo"] | None = None
    """Which of TRL's trainers; none = `trainer:` in the file, or else the only one that has all its fields and is for such data."""
    override: tuple[str, ...] = ()
    """A field that replaces that of the file, such as beta=0.2; may be repeated."""
    eval_data: str | None = None
    """File that TRL evaluates on while it trains; without one eval_strategy is off."""

    def __post_init__(self) -> None:
        if self.trainer is not None and self.trainer not in KINDS:
            raise ValueError(f"'{self.trainer}' is no trainer of TRL that is run here; known: {', '.join(KINDS)}")

    def usual(self) -> dict[str, str]:
        """Model and data of the file."""
        fields = ConfigFile.read(self.config, self.override).fields
        model, revision = fields.get("model_name_or_path"), fields.get("model_revision", "main")
        named = {"model": f"hf:{model}@{revision}" if model and revision != "main" else model, "data": fields.get("dataset_name")}
        return {name: str(value) for name, value in named.items() if value}

    def train(self, model: LocalModel, data: Path, *, folder: Path, report: Report) -> tuple[LocalModel, TrainResult, dict[str, Any]]:
        """The model, its course and its settings, as TRL has them. Raises ConfigError for what TRL does not accept, DataError for unreadable data."""
        from fiducial.models.embedded import quiet
        from fiducial.models.local import LocalModel

        plan = ConfigFile.read(self.config, self.override).plan(self.trainer, _rows(data), folder, evaluates=self.eval_data is not None)
        rows, test = _fitting(plan, model, data), _fitting(plan, model, Path(self.eval_data)) if self.eval_data else {}
        base = model.folder
        uri = model.uri if base is not None else str(folder / "base")
        base = base or model.save(folder / "base")  # TRL opens models from a folder
        model.close()
        with _settled(plan.environment), quiet(), _objections(plan.kind):
            trainer = _trainer(plan, base, rows, test, report)
            trainer.train(resume_from_checkpoint=_checkpoint(folder))
            module = trainer.accelerator.unwrap_model(trainer.model)
            if plan.kind == "reward":
                made = _scorer(module, base, trainer.processing_class, uri, trainer.train_dataset[:])
            else:
                made = LocalModel(module, trainer.processing_class, uri=uri)
            return made, _result(trainer, rows, packed=plan.kind == "sft" and plan.args.packing), plan.settings


def _rows(path: Path) -> dict[str, list[Any]]:
    """The columns of a file, as they stand there."""
    from fiducial.data.rows import read_rows

    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {first_line(error)}", hint="give a Parquet or JSON Lines file") from error
    else:
        rows = [row.values for row in read_rows(path)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise DataError(f"{path} has no rows", hint="give data to train on")
    return {name: [row.get(name) for row in rows] for name in names}


def _fitting(plan: Plan, model: LocalModel, path: Path) -> dict[str, list[Any]]:
    """The columns of a file; for a reward model, pairs as token ids that end where a score is read."""
    if plan.kind != "reward":
        return _rows(path)
    from fiducial.data.formats import best, read_groups

    found: dict[str, list[Any]] = {"chosen_ids": [], "rejected_ids": []}
    for group in read_groups(path):
        top = best(group)
        for k, completion in enumerate(group.completions):
            if top is not None and k != top:
                found["chosen_ids"].append(model.encode(group.prompt.messages, group.completions[top].text)[0])
                found["rejected_ids"].append(model.encode(group.prompt.messages, completion.text)[0])
    return found


def _trainer(plan: Plan, base: Path, rows: Mapping[str, list[Any]], test: Mapping[str, list[Any]], report: Report) -> Any:
    """TRL's trainer, which reports what it logs."""
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                report(state.global_step, state.max_steps, _numbers(logs))

    init = {"attn_implementation": plan.model.attn_implementation, "dtype": plan.model.dtype}
    plan.args.model_init_kwargs = init | (plan.args.model_init_kwargs or {})
    rewards = {"reward_funcs": _rewards(plan.script)} if plan.kind in ("grpo", "rloo") else {}
    trainer = getattr(trl, f"{KINDS[plan.kind]}Trainer")(
        model=str(base),
        args=plan.args,
        train_dataset=Dataset.from_dict(dict(rows)),
        eval_dataset=Dataset.from_dict(dict(test)) if test else None,
        quantization_config=trl.get_quantization_config(plan.model),
        peft_config=trl.get_peft_config(plan.model),
        callbacks=[Told()],
        **rewards,
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for the result
    return trainer


def _rewards(script: Any) -> list[Any]:
    """Reward functions as `trl grpo` finds them: TRL's by their names, others by their import path, from the current folder too."""
    from trl import rewards

    found: list[Any] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    for name in script.reward_funcs or ():
        module, dot, function = name.rpartition(".")
        if name == "get_soft_overlong_punishment":  # with the numbers that TRL's script gives it
            found.append(rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256))
            continue
        sys.path.insert(0, os.getcwd())
        try:
            found.append(getattr(importlib.import_module(module) if dot else rewards, function))
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"the reward function '{name}' is not found: {first_line(error)}", hint="give module.function, or a name of TRL's") from error
        finally:
            sys.path.remove(os.getcwd())
    if not found:
        raise ConfigError("there is no reward to learn from", hint="give reward_funcs: [module.function]")
    return found


@contextmanager
def _settled(environment: Mapping[str, str]) -> Iterator[None]:
    """No network, no progress bars, and the variables that the file asks for; all as before afterwards."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub import constants

    before, offline, bars = dict(os.environ), constants.HF_HUB_OFFLINE, not are_progress_bars_disabled()
    os.environ.update(environment)
    constants.HF_HUB_OFFLINE = True
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about one another
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        constants.HF_HUB_OFFLINE = offline
        if bars:
            enable_progress_bars()


@contextmanager
def _objections(kind: str) -> Iterator[None]:
    """What TRL objects to as a ConfigError: some fields it reads only when it trains."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError, NotImplementedError) as error:  # boundary: a library and the functions it calls
        raise ConfigError(
            f"TRL's {kind} trainer says: {first_line(error)}", hint="change the field or the column that it names; --debug shows where"
        ) from error


def _checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the state of the trainer comes last."""
    found = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if p.parent.name.rpartition("-")[2].isdigit() and _whole(p)]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def _whole(path: Path) -> bool:
    """Whether a JSON file was written to its end."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _result(trainer: Any, rows: Mapping[str, list[Any]], *, packed: bool) -> TrainResult:
    from fiducial.training.loop import TrainResult

    state, given = trainer.state, len(next(iter(rows.values())))
    history = [{"step": float(entry["step"])} | _numbers(entry) for entry in state.log_history if "loss" in entry]
    seconds = next((entry["train_runtime"] for entry in reversed(state.log_history) if "train_runtime" in entry), 0.0)
    tokens = int(next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), 0))
    kept = given if packed else min(given, len(trainer.train_dataset))  # a packed row holds several, and none is left out
    stop = "" if state.global_step >= state.max_steps else "TRL stopped before the last step"
    return TrainResult(state.global_step, state.max_steps, kept, given - kept, tokens, tokens, seconds, stop, history)


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}


def _scorer(module: Any, base: Path, tokenizer: Any, uri: str, rows: Mapping[str, list[Any]]) -> LocalModel:
    """A reward model in our form: the language model around the trained body, and beside it the score head with its scale on pairs of the data."""
    import torch
    from transformers import AutoModelForCausalLM

    from fiducial.models.local import LocalModel
    from fiducial.models.scorehead import Scale, ScoreHead, scores
    from fiducial.training.loop import SCALED

    whole = module.merge_and_unload() if hasattr(module, "merge_and_unload") else module
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=whole.dtype, local_files_only=True).to(whole.device)
    setattr(causal, causal.base_model_prefix, getattr(whole, whole.base_model_prefix))
    causal.tie_weights()
    made = LocalModel(causal, tokenizer, uri=uri)
    made.head = ScoreHead(whole.score.weight.detach()[0].float().requires_grad_(), "better", "align/trl")
    chosen, rejected = (rows[side][:: -(-len(rows[side]) // SCALED)] for side in ("chosen_ids", "rejected_ids"))
    preferred = torch.tensor([1.0] * len(chosen) + [0.0] * len(rejected))
    made.head = replace(made.head, scale=Scale.of(scores(made, [*chosen, *rejected]), preferred))
    return made
