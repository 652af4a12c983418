"""Training of ATP's modules on a frozen model; `scripts/train_atp.py` is its command line.

Loss: cross-entropy of the answers under soft masks + depth_weight * depth loss + target_weight * budget loss. Inferred:
the budget loss is on shares of the tokens (0..1) with a weight that outweighs the depth loss, which always pulls down;
the re-implementations take tokens and 0.2 (`raw_target=True, target_weight=0.2`). The temperature of the soft masks
rises over the run so that they end as good as hard. The re-implementations have 10 and 100, which is not enough: the
frozen embedded model, trained to the end at 100, went on reading tokens through masks of one per cent (answer loss 0.19
under the soft masks, 0.46 under the hard ones), while at 1000 the two agree (0.42 and 0.46).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmprune.api import patch
from vlmprune.methods.atp.data import IGNORE, Row, encode
from vlmprune.methods.atp.method import Atp
from vlmprune.methods.atp.modules import AtpConfig, Thresholds, load, save
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.layout import upload
from vlmprune.patches import family_of
from vlmprune.trace import Trace

__all__ = [
    "Training",
    "budget_loss",
    "depth_loss",
    "facts_of",
    "plot",
    "shares_left",
    "survey",
    "train",
]

# --- losses ---------------------------------------------------------------------------------------------------------


def depth_loss(shares: torch.Tensor, layers: tuple[int, ...]) -> torch.Tensor:
    """Sum over cuts of (share of the tokens that is left) * (layer number), averaged over images (Eq. 12).

    Args:
        shares: `(images, cuts)`, sums of soft masks over the image's number of tokens.
        layers: the 1-based layers after which the cuts are.
    """
    return (shares * shares.new_tensor(layers)).sum(1).mean()


def budget_loss(shares: torch.Tensor, target: torch.Tensor | float, tokens: int = 1) -> torch.Tensor:
    """|mean of `shares` - target| (Eq. 13); `tokens` brings it to a number of tokens, as the re-implementations do."""
    return (shares - target).mean().abs() * tokens


def shares_left(trace: Trace, soft: bool) -> torch.Tensor:
    """Share of every image's patches that ATP's cuts leave, `(images, cuts)`: soft, with gradients, or as if hard."""
    cuts = [cut for cut in trace.cuts if cut.method == "atp"]
    patches = torch.zeros(cuts[0].keep.shape)
    for i, grid in enumerate(trace.grids):
        patches[i, : grid.tokens] = (~grid.newline).float()
    patches = upload(patches, cuts[0].keep.device)
    weights = [cut.soft if soft else cut.keep for cut in cuts]
    return torch.stack([(w.to(patches.device) * patches).sum(1) for w in weights], 1) / patches.sum(1, keepdim=True)


def answer_loss(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the answers: the mean over each answer's tokens, then over samples."""
    labels = inputs["labels"]
    longest = int((labels != IGNORE).sum(1).max())
    given = {k: v for k, v in inputs.items() if k != "labels"}
    logits = model(**given, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1].float()
    labels = labels[:, -longest:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return (each.sum(1) / (labels != IGNORE).sum(1)).mean()


# --- training -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def shuffled(seed: int, length: int) -> list[int]:
    """A permutation."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Training:
    """How modules are trained.

    Args:
        steps: optimiser steps.
        batch: questions a step, over all processes.
        lr: of the modules (AdamW, no weight decay), after `warmup` steps, falling to a tenth of it.
        depth_weight, target_weight, raw_target: see this module's docstring.
        temperature: of the soft masks at the start and, from four fifths of the run on, at the end.
        save_every: steps between two saved states.
        seed: of the initial weights and of the order of the data.
    """

    steps: int = 500
    batch: int = 16
    lr: float = 1e-4
    warmup: int = 100
    depth_weight: float = 0.01
    target_weight: float = 2.0
    raw_target: bool = False
    temperature: tuple[float, float] = (10.0, 1000.0)
    save_every: int = 50
    seed: int = 0

    def heat(self, step: int) -> float:
        """Temperature of a step: geometric from start to end."""
        (first, last), done = self.temperature, min(1.0, step / max(1, 0.8 * self.steps))
        return first * (last / first) ** done

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * (1 - 0.9 * step / self.steps)

    def rows(self, step: int, length: int, part: int, parts: int) -> list[int]:
        """Which rows of the data one of the processes takes at a step: every epoch has an order of its own."""
        mine = range(step * self.batch, (step + 1) * self.batch)[part * self.batch // parts :][: self.batch // parts]
        return [shuffled(self.seed * 1_000_003 + number // length, length)[number % length] for number in mine]


def facts_of(model: nn.Module) -> ModelFacts:
    """The facts of a supported model that modules are trained for."""
    family = family_of(model)
    return family.facts(family.inner(model))


def train(
    model: nn.Module,
    processor: Any,
    data: Sequence[Row],
    config: AtpConfig,
    out: str | Path,
    options: Training | None = None,
    *,
    template: str | None = None,
    workers: int = 0,
    accelerator: Any = None,
    progress: bool = True,
) -> Thresholds:
    """Train modules with the model frozen, and write them to `out`.

    `out` gets the weights (for `weights=`), the state to resume from, a log and, with matplotlib, a plot of the losses.
    The same call on the same folder resumes. Runs on as many processes as `accelerate launch` starts.

    Raises:
        ValueError: an average that cannot be met, or a folder with the state of another training.
    """
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    accelerator, options, out = accelerator or Accelerator(), options or Training(), Path(out)
    if options.batch % accelerator.num_processes:
        raise ValueError(f"batch={options.batch} cannot be split over {accelerator.num_processes} processes.")
    if not isinstance(config.average, int):
        config.target(1)
    torch.manual_seed(options.seed)
    thresholds = Thresholds(config).to(accelerator.device).train()
    model = model.to(accelerator.device).eval().requires_grad_(False)
    optimizer = accelerator.prepare(torch.optim.AdamW(thresholds.parameters(), lr=options.lr, weight_decay=0.0))
    history: list[dict[str, float]] = []
    if (out / "state.pt").exists():
        history = resume(out / "state.pt", thresholds, optimizer, options)
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)

    start = len(history)
    share = partial(options.rows, length=len(data), part=accelerator.process_index, parts=accelerator.num_processes)
    prepare = partial(encode, processor=processor, template=template)
    steps = Steps(share, start, options.steps)
    loader = torch.utils.data.DataLoader(data, batch_sampler=steps, collate_fn=prepare, num_workers=workers)
    bar = tqdm(total=options.steps, initial=start, disable=not (progress and accelerator.is_main_process))
    with patch(model, Atp(thresholds=thresholds)) as handle:
        for step, inputs in enumerate(loader, start):
            for group in optimizer.param_groups:
                group["lr"] = options.rate(step)
            thresholds.temperature = options.heat(step)
            with accelerator.autocast():
                answered = answer_loss(model, as_model_wants(inputs, model, accelerator.device))
            losses = {"answer": answered} | budget(handle.trace, config, options, accelerator)
            loss = answered + options.depth_weight * losses["depth"] + options.target_weight * losses.pop("missed")
            accelerator.backward(loss)
            share_gradients(thresholds, accelerator)
            accelerator.clip_grad_norm_(thresholds.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            history.append({"step": step + 1} | means({"loss": loss, **losses}, accelerator))
            bar.update()
            bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", average=f"{history[-1]['average']:.3f}")
            done = step + 1 == options.steps
            if accelerator.is_main_process and (done or (step + 1) % options.save_every == 0):
                keep(out, thresholds, optimizer, options, history)
    bar.close()
    accelerator.wait_for_everyone()
    return load(out).to(accelerator.device)


def as_model_wants(inputs: dict[str, torch.Tensor], model: nn.Module, device: Any) -> dict[str, torch.Tensor]:
    """Inputs on a device, pictures in the model's dtype."""
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}


def means(losses: dict[str, torch.Tensor], accelerator: Any) -> dict[str, float]:
    """Losses by name, averaged over the processes."""
    told = torch.stack([loss.detach() for loss in losses.values()]).float()
    return dict(zip(losses, accelerator.reduce(told, "mean").tolist(), strict=True))


class Steps:
    """The rows of every step that is left, for a data loader."""

    def __init__(self, rows: Any, start: int, stop: int):
        self.rows, self.steps = rows, range(start, stop)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows(step) for step in self.steps)


def budget(trace: Trace, config: AtpConfig, options: Training, accelerator: Any) -> dict[str, torch.Tensor]:
    """Depth loss, budget loss, and the share of tokens over all layers as soft and as hard masks count it."""
    soft, hard = shares_left(trace, soft=True), shares_left(trace, soft=False)
    totals = [grid.patches for grid in trace.grids]
    target = soft.new_tensor([config.target(n) for n in totals])
    over = config.mean(soft) - target
    # all processes aim at one mean: its value is global, its gradient this process's part
    over = over + (accelerator.reduce(over.detach().mean(), "mean") - over.mean()).detach()
    return {
        "depth": depth_loss(soft, config.layers),
        "missed": budget_loss(over, 0.0, sum(totals) // len(totals) if options.raw_target else 1),
        "soft_average": config.mean(soft).mean(),
        "average": config.mean(hard).mean(),
    }


def share_gradients(thresholds: nn.Module, accelerator: Any) -> None:
    """Average the gradients over all processes; only the modules travel, never the frozen model."""
    params = list(thresholds.parameters())
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if accelerator.num_processes == 1:
        return
    flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in params]), "mean")
    for p, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(piece.view_as(p))


def keep(out: Path, thresholds: Thresholds, optimizer: Any, options: Training, history: list[dict]) -> None:
    """Write weights, state, log and plot; a run that is killed meanwhile leaves the old state."""
    save(thresholds, out)
    state = {"modules": thresholds.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
    torch.save(state | {"config": asdict(thresholds.config), "options": asdict(options)}, out / "state.tmp")
    (out / "state.tmp").replace(out / "state.pt")
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    plot(history, out / "loss.png")


def resume(file: Path, thresholds: Thresholds, optimizer: Any, options: Training) -> list[dict[str, float]]:
    """Load a state and return its history."""
    state = torch.load(file, weights_only=True, map_location="cpu")
    for name, was, now in (
        ("config", state["config"], asdict(thresholds.config)),
        ("options", state["options"], asdict(options)),
    ):
        free = ("save_every",) if name == "options" else ()
        if other := [k for k in now if k not in free and was.get(k) != now[k]]:
            told = ", ".join(f"{k}={was.get(k)!r} (now {now[k]!r})" for k in other)
            raise ValueError(f"{file.parent} holds another training: {told}. Choose another folder or delete it.")
    thresholds.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    return state["history"]


def plot(history: list[dict[str, float]], file: Path) -> bool:
    """Draw losses and averages; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.5), layout="tight")
    steps, axes = [row["step"] for row in history], figure.subplots(1, 2)
    for axis, names in zip(axes, (("loss", "answer"), ("soft_average", "average")), strict=True):
        for name in names:
            axis.plot(steps, [row[name] for row in history], label=name.replace("_", " "))
        axis.set_xlabel("step")
        axis.legend()
    axes[1].set_ylabel("share of visual tokens, mean over layers")
    figure.savefig(file, dpi=100)
    return True


# --- what was learned -----------------------------------------------------------------------------------------------


@torch.no_grad()
def survey(
    model: nn.Module,
    processor: Any,
    method: Atp,
    rows: Sequence[Row],
    *,
    batch: int = 16,
    template: str | None = None,
) -> dict[str, torch.Tensor]:
    """What trained modules do to unseen questions.

    Returns:
        `average` `(rows,)`: share of the patches over all layers; `shares` `(rows, cuts)` left after every cut;
        `theta_r`, `theta_s` `(rows, cuts)`.
    """
    thetas: list[list[torch.Tensor]] = [[] for _ in method.thresholds.cuts]
    hooks = [
        module.register_forward_hook(lambda _, args, out, mine=mine: mine.append(torch.stack(out, 1).float().cpu()))
        for module, mine in zip(method.thresholds.cuts, thetas, strict=True)
    ]
    shares = []
    try:
        with patch(model, method) as handle:
            for start in range(0, len(rows), batch):
                some = [rows[i] for i in range(start, min(start + batch, len(rows)))]
                inputs = as_model_wants(encode(some, processor, template), model, model.device)
                del inputs["labels"]
                model(**inputs, use_cache=False, logits_to_keep=1)
                shares.append(shares_left(handle.trace, soft=False).float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
    found, both = torch.cat(shares), torch.stack([torch.cat(mine) for mine in thetas], 1)
    return {
        "average": method.thresholds.config.mean(found),
        "shares": found,
        "theta_r": both[..., 0],
        "theta_s": both[..., 1],
    }
