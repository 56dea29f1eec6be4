"""How to train. Importing this loads no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainOptions(BaseModel):
    """How to train; what to train for is the objective's business."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the groups; fractions are allowed."""
    batch: int = Field(default=8, ge=1)
    """Groups per optimizer step, over all processes."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. Default: the objective's own, ten times that for LoRA."""
    lora_rank: int = Field(default=16, ge=0)
    """Rank of the adapter on all linear layers; 0 trains all weights, with float32 masters."""
    lora_depth: float = Field(default=1.0, gt=0, le=1)
    """Share of the layers, from the top, that carry the adapter. Layers below stay as they are and cost no backward pass."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises; then it falls to zero along a cosine."""
    learn: Literal["completion", "assistant", "all"] = "completion"
    """What demonstrations teach: the completion, every turn of the assistant, or every token; the last two are for objectives that imitate."""
    neftune: float = Field(default=0.0, ge=0)
    """Noise on the input embeddings while demonstrations are learnt (NEFTune's alpha, often 5): uniform in [-1, 1] times alpha / sqrt(tokens x width),
    drawn anew for every completion and step. For objectives that imitate; what completions share is then computed for each."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient."""
    from_scratch: bool = False
    """Begin with random weights in the shape of the model's configuration. Needs lora_rank 0."""
    sizes: dict[str, Any] | None = None
    """Entries of that configuration to replace when training from scratch, for example {num_hidden_layers: 4}."""
    max_length: int = Field(default=1024, ge=2)
    """Longest prompt and completion, in tokens. Longer groups are left out and counted, never cut."""
    seed: int = 0
    """Decides the order of the groups, and the start of the adapter or of weights from scratch."""
    save_every: int = Field(default=25, ge=1)
    """Steps between checkpoints."""
    watch_every: int = Field(default=0, ge=0)
    """Steps between looks at fresh samples and at what is held out; 0 looks at the end only."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts, chosen by hash, that are not trained on: loss and metrics on them are measured before, at every look and after,
    and a run with looks stops when they get worse twice running."""
    minutes: float | None = Field(default=None, gt=0)
    """Time for training, counted over resumptions. When the first steps show that the schedule takes longer, it is shortened to fit."""
