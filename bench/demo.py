"""The demo's figures, and what its repaired model does with public prompts.

    fiducial loop                              # or: make demo
    python bench/demo.py --run last            # writes bench/results/demo.{json,md}

The public prompts are the 100 harmful goals of JailbreakBench and the 120 harmless test prompts of erase-and-check, read from the shared
data that stands beside a checkout. Nothing of them was trained on.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from fiducial.app.check import CheckOptions, run_check
from fiducial.app.cli.progress import PlainProgress
from fiducial.core.intervals import Rate
from fiducial.core.run import Run

HERE = Path(__file__).parent
ASKED = {"refuse": "harmful goals", "comply": "benign twins", "answer": "ordinary prompts"}
WHICH = {
    "total": lambda _: "",
    "family": lambda s: " (family held out)" if s["held_out"] else " (family trained on)",
    "language": lambda s: f", {ASKED[s['expected']]}",
}
"""What is said beside the name of a slice, by its kind."""
CHANGES = {"capability": "capability items right", "repetition": "repeated 4-grams in whole answers to ordinary requests"}
"""What is measured as a paired change."""
SHARED = HERE.parents[1] / "shared" / "data"


def main() -> None:
    """Checks the model on both sets and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="last")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    run = next(r for r in reversed(Run.all()) if r.facts.command == "loop") if options.run == "last" else Run.open(options.run)
    summary = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    outside = {
        name: {model: checked(uri, name) for model, uri in (("base", summary["model"]), ("repaired", f"run:{run.id}"))}
        for name in ("jailbreakbench", "safe-prompts")
    }
    record = {"date": datetime.now(UTC).date().isoformat(), "machine": summary["machine"], "versions": summary["versions"], "seconds": summary["seconds"]}
    began, ended = (datetime.fromisoformat(moment) for moment in (run.facts.started, run.facts.finished))
    record |= {"wall_seconds": (ended - began).total_seconds(), "peak_memory_mib": summary["peak_memory_mib"]}
    record |= {"evidence": summary["evidence"], "slices": [s for s in summary["slices"] if s["kind"] != "category"], "outside": outside}
    record |= {"decision": summary["decision"], "judge": summary["judge"], "options": summary["options"]}
    record |= {"candidates": summary["candidates"], "why": summary["why"]}
    options.out.mkdir(exist_ok=True)
    (options.out / "demo.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (options.out / "demo.md").write_text(table(record), encoding="utf-8")
    print(table(record))


def checked(uri: str, name: str) -> dict[str, int]:
    """Refusals of one model on one public set: hits, n, not scored."""
    if name == "jailbreakbench":
        with (SHARED / name / "harmful_behaviors.csv").open(encoding="utf-8") as file:
            prompts = [row["Goal"] for row in csv.DictReader(file)]
    else:
        prompts = [line.strip() for line in (SHARED / name / "safe_prompts_test.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), encoding="utf-8")
        given = CheckOptions(model=uri, goals=str(file), expected="refuse" if name == "jailbreakbench" else "answer")
        run = Run.create("check", given.model_dump(mode="json"), {}, 0)
        with run:
            figures = run_check(given, run, PlainProgress()).data["figures"]
    (found,) = figures.values()
    hits = found["n"] - found["hits"] if name == "jailbreakbench" else found["hits"]
    return {"refused": hits, "n": found["n"], "not_scored": found["not_scored"]}


def table(record: dict) -> str:
    """The record as Markdown."""
    minutes, wall = sum(record["seconds"].values()) / 60, record["wall_seconds"] / 60
    lines = [
        "# The demo: SmolLM2-135M-Instruct, repaired",
        "",
        f"{record['date']}. {record['machine']}. The loop took {wall:.1f} minutes, its stages {minutes:.1f}. "
        f"Largest resident memory {record['peak_memory_mib']} MiB. Not measured on GPU.",
        f"Judge: {record['judge'].get('judge')}; its errors are in judge.md. Wilson's intervals at 95 %, wider where a goal stands behind several trials.",
        "",
        "| held-out split | before | after |",
        "|---|---|---|",
    ]
    for s in record["slices"]:
        if s["kind"] in WHICH:
            what = "complied" if s["expected"] == "refuse" else "refused"
            lines.append(f"| {s['name']}{WHICH[s['kind']](s)}: {what} | {share(s['before'])} | {share(s['after'])} |")
    for e in record["evidence"]:
        if e["name"] in CHANGES:
            change = f"{100 * e['value']:+.1f} points ({100 * e['low']:+.1f} to {100 * e['high']:+.1f}, n = {e['n']}, paired)"
            lines.append(f"| {CHANGES[e['name']]} | {e['baseline']:.0%} | {change} |")
    lines += ["", "| public prompts | base model | repaired |", "|---|---|---|"]
    for name, models in record["outside"].items():
        counts = [f"{Rate(m['refused'], m['n'])}" + (f", {m['not_scored']} not scored" if m["not_scored"] else "") for m in models.values()]
        lines.append(f"| {name}: refused | {counts[0]} | {counts[1]} |")
    lines += ["", record["why"], "", f"Gate: **{record['decision']['outcome']}**", ""]
    lines += [f"- {c['outcome']}: {c['rule']}: {c['reason']}" for c in record["decision"]["checks"]]
    lines += ["", "| stage | seconds |", "|---|---|", *(f"| {k} | {v:.0f} |" for k, v in record["seconds"].items()), ""]
    return "\n".join(lines)


def share(tally: dict) -> str:
    """A tally as a rate with its interval."""
    unscored = tally.get("not_scored", 0)
    return str(Rate(tally["hits"], tally["n"], tally.get("design", 1.0))) + (f", {unscored} not scored" if unscored else "")


if __name__ == "__main__":
    main()
