"""What the trend scripts share: options, seeds that survive a cut, the verdict on a direction, the record.

A trend script asks whether what a paper reports for large models shows in the same direction on SmolLM2-135M-Instruct with the product's own
methods. A direction holds ("yes") when the interval over seeds of its difference lies above 0, does not ("no") when it lies below, and
is "not decided" otherwise. Intervals are Student's at 95 %, with the seed as the unit. What does not hold is reported, not tuned away.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from protocol import default_threads, machine, versions  # imports fiducial, then torch  # isort: skip
import torch

from fiducial.core.intervals import Mean, mean
from fiducial.core.records import Group, Prompt, digest

HERE = Path(__file__).resolve().parent
Holds = Literal["yes", "no", "not decided"]
FIRST = 1
"""The first seed that is reported. Sizes and learning rates are set on seed 0."""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % point of Student's distribution for the mean of so many seeds."""


@dataclass(frozen=True, slots=True)
class Direction:
    """One thing a paper says, and what was found here."""

    claim: str
    source: str
    """Paper and place in it."""
    ours: str
    """The figure that was decided on, with n and interval."""
    holds: Holds


@dataclass(frozen=True, slots=True)
class Trend:
    """What a script found; `record` writes it."""

    name: str
    """The script's name without ending."""
    question: str
    setting: str
    """Model, data, sizes, steps: one paragraph."""
    directions: Sequence[Direction]
    rows: Sequence[Mapping[str, Any]] = ()
    """The table of figures; all rows have the same keys."""
    seeds: Sequence[Mapping[str, Any]] = ()
    """Raw results per seed, for the JSON file."""
    notes: Sequence[str] = field(default=())


def arguments(description: str | None, argv: Sequence[str] | None = None, *, seeds: int = 3) -> argparse.Namespace:
    """`--seeds N`, `--small`, `--out FOLDER`, `--threads N`; sets torch's threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many (default {seeds}, at most 10)")
    parser.add_argument("--small", action="store_true", help="a tiny random model and sizes of seconds: shows that it runs, decides nothing")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record (default bench/trends/results; with --small nothing is written)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="threads of torch (default: the free cores, at most OMP_NUM_THREADS)")
    chosen = parser.parse_args(argv)
    if not 2 <= chosen.seeds <= max(STUDENT) or chosen.threads < 1:
        parser.error(f"--seeds is 2 to {max(STUDENT)} and --threads at least 1")
    torch.set_num_threads(chosen.threads)
    if chosen.out is None and not chosen.small:
        chosen.out = HERE / "results"
    return chosen


def open_model(chosen: argparse.Namespace) -> Any:
    """A fresh SmolLM2-135M-Instruct on the CPU, or the tiny random model."""
    import fiducial

    return fiducial.open("tiny" if chosen.small else "smollm2", **({} if chosen.small else {"device": "cpu"}))


def over(model: Any) -> Any:
    """Another model over the same weights, to be trained with an adapter; `model` stays as it was."""
    from fiducial.models.local import LocalModel

    return LocalModel(model.module, model.tokenizer, uri=model.uri, base=model.base)


def short_prompts(model: Any, count: int, *, skip: int = 0, tokens: int = 20) -> list[Prompt]:
    """English everyday requests that the product comes with, of at most so many tokens; from the `skip`-th of these on."""
    from fiducial.data.load import ordinary

    fitting = [p for p in ordinary() if p.language == "en" and (model.uri == "tiny" or len(model.tokenizer(p.text)["input_ids"]) <= tokens)]
    if len(fitting) < skip + count:
        raise ValueError(f"there are {len(fitting)} such prompts, not {skip + count}")
    return random.Random(0).sample(fitting, len(fitting))[skip : skip + count]


def answers(model: Any, prompts: Sequence[Prompt], *, k: int, tokens: int, seed: int) -> list[Group]:
    """`k` answers of the model to each prompt at temperature 1, with their token ids."""
    from fiducial.training import samples
    from fiducial.training.online_options import OnlineOptions

    return samples.draw(model, list(enumerate(prompts)), OnlineOptions(max_tokens=tokens), k=k, seed=seed)


def per_seed(name: str, chosen: argparse.Namespace, settings: Any, run: Callable[[int], Mapping[str, Any]], *, first: int = FIRST) -> list[dict[str, Any]]:
    """`run(seed)` for every seed from `first` on. Each result is appended to OUT/NAME.partial.jsonl at once, and one that is there already with the same
    `settings` (anything that has a JSON form; put every number of the experiment in) is not computed again."""
    key, path = digest([settings, chosen.small]), _partial(chosen.out, name)
    done = {line["seed"]: line for line in _kept(path) if line["settings"] == key}
    found = []
    for seed in range(first, first + chosen.seeds):
        if seed not in done:
            began = datetime.now()
            result = dict(run(seed))
            done[seed] = {
                "seed": seed,
                "settings": key,
                "date": began.isoformat(timespec="seconds"),
                "seconds": round((datetime.now() - began).total_seconds(), 1),
            } | result
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps(done[seed], ensure_ascii=False))  # a line before it may have been cut
        print(f"{name}, seed {seed}: {done[seed]['seconds']} s", flush=True)
        found.append(done[seed])
    return found


def summary(values: Sequence[float]) -> str:
    """Mean over seeds with Student's interval: `0.41 (0.32 to 0.5, n = 3)`."""
    found = mean(values)
    low, high = interval(found)
    return f"{found.value:.3g} ({low:.3g} to {high:.3g}, n = {found.n})"


def interval(found: Mean) -> tuple[float, float]:
    """Student's interval of a mean over 2 to 10 seeds."""
    return found.interval(STUDENT[found.n])


def decided(differences: Sequence[float]) -> Holds:
    """Whether the differences over seeds, positive in the paper's direction, are above 0. Differences that are all the same, as counts of few cases
    can be, say nothing about their spread and decide nothing."""
    if len(set(differences)) == 1:
        return "not decided"
    low, high = interval(mean(differences))
    return "yes" if low > 0 else "no" if high < 0 else "not decided"


def direction(claim: str, source: str, differences: Sequence[float], what: str) -> Direction:
    """A direction decided by one difference per seed, positive where the paper's claim holds; `what` says what it is a difference of."""
    return Direction(claim, source, f"{what}: {summary(differences)}", decided(differences))


def record(trend: Trend, out: Path | None, *, small: bool = False) -> None:
    """Writes OUT/NAME.json and OUT/NAME.md, removes the partial results, and prints the table; writes nothing when `out` is None."""
    found = asdict(trend) | {
        "small": small,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "minutes": round(sum(seed.get("seconds", 0.0) for seed in trend.seeds) / 60, 1),
        "threads": torch.get_num_threads(),
        "niceness": os.nice(0),
        "load": [round(x, 2) for x in os.getloadavg()],
        "machine": machine(),
        "versions": versions(),
    }
    text = page(found)
    print(text, flush=True)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{trend.name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / f"{trend.name}.md").write_text(text, encoding="utf-8")
    partial = _partial(out, trend.name)
    if partial is not None:
        partial.unlink(missing_ok=True)


def page(found: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    cpu = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    kind = "Tiny random model: shows that it runs, decides nothing" if found["small"] else f"{found['minutes']} minutes for {len(found['seeds'])} seeds"
    circumstances = f"{found['date']}. {cpu['cpu']}, {cpu['cores']} cores, {cpu['memory_gib']} GiB; threads {found['threads']}, "
    circumstances += f"niceness {found['niceness']}, load {found['load']}. {kind}. {packages}."
    lines = [f"# {found['name']}", "", found["question"], "", found["setting"], "", circumstances, ""]
    lines += _table([{"the paper's claim": f"{d['claim']} ({d['source']})", "ours": d["ours"], "direction holds": d["holds"]} for d in found["directions"]])
    if found["rows"]:
        lines += ["", "## Figures", "", *_table(found["rows"])]
    if found["notes"]:
        lines += ["", "## Remarks", "", *(f"- {note}" for note in found["notes"])]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0]), *("| " + " | ".join(str(v) for v in row.values()) + " |" for row in rows)]


def _partial(out: Path | None, name: str) -> Path | None:
    return None if out is None else out / f"{name}.partial.jsonl"


def _kept(path: Path | None) -> list[dict[str, Any]]:
    """The whole lines of a file of partial results."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
