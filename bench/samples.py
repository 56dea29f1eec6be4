"""Sampling: eight completions of one prompt, and 64 different prompts, against transformers' `generate`.

    python bench/samples.py [--repetitions N] [--threads N] [--small]

Temperature 1, no cut of the distribution, no end token, so that both sides write the same number of tokens. `generate` gets
`num_return_sequences`, or left-padded batches sorted by length at its best batch size; it returns no log-probabilities, ours does.
Samples of two programs cannot be compared, so exactness is checked twice in float32: our log-probability of every sampled token
against a plain forward pass over prompt and completion, and greedy tokens against `generate`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from protocol import TOLERANCE, Bench, Case, Claim, Models, Text, interleave, largest, models, once, options, quiet  # isort: skip

import torch
from torch import Tensor

from fiducial.models.sampling import generate

BATCHES = (16, 64)
Tokens = list[int]


def ours(module: Any, prompts: Sequence[Tokens], *, k: int, new: int, temperature: float = 1.0) -> list[tuple[Tokens, Tensor]]:
    """(prompt and completion, log-probabilities of the completion) per sample."""
    given = generate(module, prompts, k=k, max_tokens=new, temperature=temperature, eos=(), seed=0)
    return [(prompt + list(s.tokens), torch.tensor(s.logprobs)) for prompt, samples in zip(prompts, given, strict=True) for s in samples]


def peer(
    module: Any, prompts: Sequence[Tokens], *, k: int, new: int, batch: int, temperature: float = 1.0, scored: bool = False
) -> list[tuple[Tokens, Tensor]]:
    """The same by `generate`; log-probabilities only where `scored`, empty otherwise."""
    from transformers import GenerationConfig

    random = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    config = GenerationConfig(
        max_new_tokens=new, num_return_sequences=k, eos_token_id=None, pad_token_id=0, output_logits=scored, return_dict_in_generate=True, **random
    )
    own, module.generation_config = module.generation_config, GenerationConfig()
    found: list[list[tuple[Tokens, Tensor]]] = [[] for _ in prompts]
    torch.manual_seed(0)
    try:
        with quiet(), torch.no_grad():
            for chosen in _batches(prompts, batch):
                for row, sample in enumerate(_generated(module, [prompts[i] for i in chosen], config, scored)):
                    found[chosen[row // k]].append(sample)
    finally:
        module.generation_config = own
    return [sample for samples in found for sample in samples]


def _batches(prompts: Sequence[Tokens], batch: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def _generated(module: Any, prompts: Sequence[Tokens], config: Any, scored: bool) -> list[tuple[Tokens, Tensor]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = module.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    rows, k = out.sequences, len(out.sequences) // len(prompts)
    logp = torch.stack([torch.log_softmax(step.float(), -1) for step in out.logits], 1) if scored else None
    found = []
    for row, tokens in enumerate(rows[:, width:]):
        picked = logp[row].gather(-1, tokens[:, None])[:, 0] if logp is not None else torch.zeros(0)
        found.append((prompts[row // k] + tokens.tolist(), picked))
    return found


@torch.no_grad()
def truth(module: Any, whole: Tokens, new: int) -> Tensor:
    """Log-probabilities of the last `new` tokens by a plain forward pass of `module`, a float32 model."""
    logits = module(input_ids=torch.tensor([whole]), use_cache=False).logits[0, -new - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(whole[-new:])[:, None])[:, 0]


def error(module: Any, samples: Sequence[tuple[Tokens, Tensor]], new: int) -> float:
    """Largest difference of the samples' log-probabilities from the truth."""
    return max(largest(logp, truth(module, whole, new)) for whole, logp in samples)


def measure(bench: Bench, loaded: Models, name: str, prompts: list[Tokens], *, k: int, new: int, target: float | None) -> None:
    """One workload: exactness in float32 on at most 8 of its prompts, then times in bfloat16."""
    exact, few = loaded.modules["float32"], prompts[:8]
    difference = error(exact, ours(exact, few, k=k, new=new), new)
    greedy, theirs = ours(exact, few, k=1, new=new, temperature=0.0), peer(exact, few, k=1, new=new, batch=8, temperature=0.0)
    same = sum(a == b for (a, _), (b, _) in zip(greedy, theirs, strict=True))
    counts: dict[str, int | str] = {"prompts": len(prompts), "prompt tokens": sum(map(len, prompts)), "samples": k * len(prompts), "new tokens each": new}
    counts["greedy equal"] = f"{same} of {len(few)}"
    difference = difference if same == len(few) else float("inf")
    of = "log-probability of each sampled token"
    if bench.small:
        bench.add(Case(name, "float32", [], {}, difference, TOLERANCE, of, {}, counts))
        return
    module = loaded.modules["bfloat16"]
    batch = _best_batch(module, prompts, k=k, new=new) if len(prompts) > 1 else 1
    side = f"generate, batch {batch}" if len(prompts) > 1 else f"generate, num_return_sequences={k}"
    sides = {side: lambda: peer(module, prompts, k=k, new=new, batch=batch), "prefix once": lambda: ours(module, prompts, k=k, new=new)}
    errors = {
        "generate": error(exact, peer(module, few, k=k, new=new, batch=8, scored=True), new),
        "prefix once": error(exact, ours(module, few, k=k, new=new), new),
    }
    times, _ = interleave(sides, bench.repetitions)
    bench.add(Case(name, "bfloat16", [Claim("prefix once", side, target)], times, difference, TOLERANCE, of, errors, counts))


def _best_batch(module: Any, prompts: Sequence[Tokens], *, k: int, new: int) -> int:
    seconds = {batch: once(lambda b=batch: peer(module, prompts, k=k, new=max(new // 4, 1), batch=b)) for batch in BATCHES}
    return min(BATCHES, key=lambda batch: seconds[batch])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes; 0 if log-probabilities and greedy tokens agree."""
    chosen = options(__doc__, argv)
    with Bench("samples", chosen) as bench:
        loaded = models(small=bench.small)
        text = Text(loaded.tokenizer)
        length, new, many, spread = (30, 6, 2, (5, 20)) if bench.small else (300, 32, 64, (16, 96))
        measure(bench, loaded, "8 samples of one prompt", [text.take(length)], k=8, new=new, target=1.4)
        measure(bench, loaded, f"{many} different prompts", [text.take(*spread) for _ in range(many)], k=1, new=new, target=None)
        bench.notes.append("Errors are each side's log-probabilities of its own samples against a plain float32 forward pass.")
        return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
