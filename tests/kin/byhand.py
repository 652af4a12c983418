"""A trace carried out by hand on a family's model.

The reference takes the embeddings of the whole row off the unpruned model (prompt and forced tokens), and runs the
host's decoder layers one by one, each with a mask written out as a matrix and no cache. Of the library it shares the
trace alone: which tokens were kept.
"""

from __future__ import annotations

from inspect import signature

import torch
from scenes import changes_of
from tiny import CACHE
from torch import nn

from kin.family import FORCED, Kin, Prompt

PIXELS = (("image", "pixel_values"), ("image", "pixel_values_images"), ("video", "pixel_values_videos"))


def language_model(model: nn.Module) -> nn.Module:
    inner = model.model
    return inner.text_model if hasattr(inner, "text_model") else inner.language_model


@torch.no_grad()
def embedded(model: nn.Module, prompt: Prompt, forced: list[int]) -> torch.Tensor:
    """`(length, dim)` what the first decoder layer of the unpruned model reads of prompt and forced tokens."""
    inputs, found = dict(prompt.inputs), []
    for name, fill in {"input_ids": forced, "attention_mask": 1, "token_type_ids": 1}.items():
        if name in inputs:
            more = torch.tensor([forced]) if name == "input_ids" else torch.full((1, len(forced)), fill)
            inputs[name] = torch.cat((inputs[name], more.long()), 1)
    first = language_model(model).layers[0]
    handle = first.register_forward_pre_hook(
        lambda m, args, kw: found.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    return found[0][0]


@torch.no_grad()
def features_of(model: nn.Module, prompt: Prompt) -> torch.Tensor:
    """`(tokens, dim)` what the encoders make of a prompt's pictures, images before videos."""
    made = []
    for kind, name in PIXELS:
        if name in prompt.inputs:
            encode = getattr(model.model, f"get_{kind}_features")
            made += encode(prompt.inputs[name], return_dict=True).pooler_output
    return torch.cat(made)


def mask_of(kin: Kin, model: nn.Module, index: int, columns: list[int], prompt: Prompt) -> torch.Tensor:
    """`(rows, keys)` bool: what sees what in decoder layer `index`, by the config and the prompt alone."""
    n, text = len(columns), model.config.get_text_config()
    row, column = torch.arange(n)[:, None], torch.arange(n)
    seen = column <= row
    if kin.blocks or kin.prefix:
        group = torch.full((n,), -1)
        for i, c in enumerate(columns):
            if kin.prefix and c < prompt.ids.shape[1]:
                group[i] = 0
            if kin.blocks:
                group[i] = next((k for k, item in enumerate(prompt.items) if c in item), -1)
        seen = seen | ((group[:, None] == group) & (group >= 0))
    types = getattr(text, "layer_types", None) or ["full_attention"] * 99
    window = getattr(text, "sliding_window", None)
    if text.model_type == "mistral":
        types = ["sliding_attention"] * 99
    if types[index] == "sliding_attention" and window:
        seen = seen & (column > row - window)
    return seen


@torch.no_grad()
def by_hand(
    kin: Kin,
    prompt: Prompt,
    trace: object,
    forced: list[int] = FORCED,
    wrong: bool = False,
    positions: str | None = None,
    features: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(1 + forced, vocab)` logits of the prompt's last token and of every forced one, with what a trace says was kept.

    Args:
        trace: None for the unpruned model.
        wrong: swap one kept token of the first image at its first cut for a dropped one.
        positions: another position policy than the trace's.
        features: `(tokens, dim)` of all pictures, where they are not those of the unpruned tower.
    """
    model = kin.model()
    lm, x, length = language_model(model), embedded(model, prompt, forced), prompt.ids.shape[1]
    if features is not None:
        x = x.index_put((torch.tensor([c for item in prompt.items for c in item]),), features)
    cuts = trace.cuts if trace else []
    changed = changes_of(trace) if wrong else []
    columns, place = list(range(len(x))), torch.arange(len(x)) + kin.origin
    alive = [[True] * len(item) for item in prompt.items]
    for index, layer in enumerate(lm.layers):
        for cut in [c for c in cuts if c.layer == index]:
            drop = set()
            for i, item in enumerate(prompt.items):
                keep = cut.keep[i, : len(item)].tolist()
                if changed and cut is changed[0] and i == 0 and any(keep):
                    gone = max(t for t, k in enumerate(keep) if k)
                    come = next(t for t in reversed(range(len(keep))) if not keep[t] and alive[i][t])
                    keep[gone], keep[come] = False, True
                if cut.merge is not None:
                    x = merged(x, cut.merge, i, item, columns, alive[i], keep)
                drop |= {c for c, k, a in zip(item, keep, alive[i], strict=True) if a and not k}
                alive[i] = [a and k for a, k in zip(alive[i], keep, strict=True)]
            if (positions or cut.positions) == "contiguous":
                place = place - torch.tensor([sum(d < c for d in drop) for c in columns])
            stay = [r for r, c in enumerate(columns) if c not in drop]
            x, place, columns = x[stay], place[stay], [columns[r] for r in stay]
        seen = mask_of(kin, model, index, columns, prompt)
        kind = [layer.self_attn.layer_type] if "layer_type" in signature(lm.rotary_emb.forward).parameters else []
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        out = layer(
            x[None],
            attention_mask=mask[None, None],
            position_embeddings=lm.rotary_emb(x[None], place[None], *kind),
            position_ids=torch.arange(len(x))[None],
        )
        x = (out[0] if isinstance(out, tuple) else out)[0]
    last = [max(r for r, c in enumerate(columns) if c < length)]
    rows = lm.norm(x)[last + [r for r, c in enumerate(columns) if c >= length]]
    return model.lm_head(rows)


def merged(x: torch.Tensor, merge: object, i: int, item: list, columns: list, alive: list, keep: list) -> torch.Tensor:
    """The rows of one picture with what flows into its anchors."""
    here, x = {c: r for r, c in enumerate(columns)}, x.clone()
    flows = zip(merge.into[i].tolist(), merge.weight[i].tolist(), strict=True)
    rows = {t: torch.zeros_like(x[0]) for t in range(len(item))}
    for t, (into, weight) in enumerate(flows):
        if t < len(item) and alive[t] and into in rows:
            rows[into] = rows[into] + weight * x[here[item[t]]]
    for t, c in enumerate(item):
        if keep[t] and alive[t]:
            x[here[c]] = rows[t]
    return x


@torch.no_grad()
def answered(kin: Kin, inputs: dict, forced: list[int] = FORCED) -> tuple[torch.Tensor, object]:
    """`(batch, 1 + forced, vocab)` logits at the last token and after every forced one, and the cache."""
    model, mask = kin.model(), inputs["attention_mask"]
    real, last = mask.sum(1), (mask * torch.arange(mask.shape[1])).amax(1)
    out = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0) + kin.origin, use_cache=True)
    logits, cache = [out.logits[torch.arange(len(mask)), last]], out[CACHE]
    for step, token in enumerate(forced):
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        out = model(
            input_ids=torch.full((len(mask), 1), token), attention_mask=mask,
            position_ids=(real + step)[:, None] + kin.origin, **{CACHE: cache}, use_cache=True,
        )  # fmt: skip
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), cache
