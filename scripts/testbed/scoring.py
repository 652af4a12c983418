"""Scores a model on a shipped split, whole, blind, or with tokens chosen by hand, and compares two runs.

The selections here are written out by hand and import nothing of vlmprune's engine, so the testbed's gates do not
depend on the code they are used to test. Anything vlmprune offers is scored by patching the model and calling
`answer` without `choose`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
import torch

from vlmprune.eval import statistics
from vlmprune.eval.testbed import Question
from vlmprune.eval.testbed.words import CATEGORIES
from vlmprune.patches.host import returned_cache, with_cache

from .scenes import GRID

#: features (N, D), CLS attention (N,), attention received (N,), tokens to keep, generator -> kept indices (k,).
Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Generator], torch.Tensor]


def choose_random(features, cls, received, keep, generator):
    """Uniformly random tokens."""
    return torch.randperm(len(features), generator=generator)[:keep]


def choose_cls(features, cls, received, keep, generator):
    """The tokens the tower's CLS token attends to most, at the layer whose output the projector reads."""
    return cls.topk(keep).indices


def choose_received(features, cls, received, keep, generator):
    """The tokens that receive most attention from all tokens at that layer."""
    return received.topk(keep).indices


def choose_maxmin(features, cls, received, keep, generator):
    """Greedy max-min diversity by cosine distance, starting from the token farthest from the mean."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.T
    chosen = [int((1 - unit @ torch.nn.functional.normalize(features.float().mean(0), dim=0)).argmax())]
    nearest = distance[chosen[0]].clone()
    while len(chosen) < keep:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return torch.tensor(chosen)


def choose_thumbnail(features, cls, received, keep, generator):
    """The first 256 tokens: all that is left of scene-llava-next's picture without its crops."""
    return torch.arange(GRID * GRID)


def choose_crops(features, cls, received, keep, generator):
    """All tokens but the thumbnail's."""
    return torch.arange(GRID * GRID, len(features))


BY_HAND: dict[str, Choose] = {
    "random": choose_random,
    "cls": choose_cls,
    "received": choose_received,
    "maxmin": choose_maxmin,
    "thumbnail": choose_thumbnail,
    "crops": choose_crops,
}


def prompt_of(processor, question: str, picture: bool = True) -> str:
    """The chat template's prompt for one question."""
    content = [{"type": "image"}] * picture + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@torch.no_grad()
def answer(model, processor, records: Iterable[Question], *, batch: int = 32, blind: bool = False) -> list[str]:
    """The model's answers by `generate`, whatever patch is on it; `blind` leaves the picture out."""
    answers = []
    records = list(records)
    for i in range(0, len(records), batch):
        some = records[i : i + batch]
        texts = [prompt_of(processor, r.question, not blind) for r in some]
        images = {} if blind else {"images": [r.image for r in some]}
        inputs = processor(text=texts, padding=True, return_tensors="pt", **images).to(model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [a.strip() for a in answers]


@torch.no_grad()
def looks(model, processor, records: Iterable[Question]) -> dict[str, tuple[torch.Tensor, ...]]:
    """What the tower says about each picture: projected features, tower features, CLS and received attention.

    The attention is that of the layer which produces the features (layer -2), averaged over heads. Returns by picture
    id: (N, D), (N, tower width), (N,), (N,). For scene-llava-next, whose tokens are of several views, the projected
    features stand for the tower's, and there is no attention.
    """
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    found = {}
    for record in records:
        if record.picture_id in found:
            continue
        if hasattr(model.model, "image_newline"):
            inputs = processor.image_processor(record.image, return_tensors="pt")
            (projected,) = model.model.get_image_features(**inputs).pooler_output
            found[record.picture_id] = projected, projected, None, None
            continue
        pixels = processor.image_processor(record.image, return_tensors="pt")["pixel_values"]
        out = tower(pixels.to(model.dtype), output_hidden_states=True, output_attentions=True)
        features = out.hidden_states[-2][0, 1:]
        attention = out.attentions[-2][0].float().mean(0)
        projected = model.model.multi_modal_projector(features)
        found[record.picture_id] = projected, features, attention[0, 1:], attention[1:, 1:].mean(0)
    return found


@torch.no_grad()
def answer_by_hand(
    model,
    processor,
    records: Iterable[Question],
    choose: Choose,
    keep: int | float,
    *,
    seen: dict[str, tuple[torch.Tensor, ...]],
    keep_positions: bool = True,
    seed: int = 0,
    batch: int = 64,
) -> list[str]:
    """Embeds the prompt, selects rows of the visual tokens, runs the language model on the short sequence.

    Args:
        model: a scene-llava or a scene-llava-next.
        processor: its processor.
        records: what to answer.
        choose: one of `BY_HAND`.
        keep: visual tokens kept, or the share of them.
        seen: of `looks`.
        keep_positions: whether the kept tokens keep their position ids, or the short sequence is renumbered.
        seed: of the random choices; each picture's choice is the same for all its questions.
        batch: questions a forward pass.
    """
    records = list(records)
    rows = {}
    for i, name in enumerate(dict.fromkeys(r.picture_id for r in records)):
        projected, features, cls, received = seen[name]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        count = keep if isinstance(keep, int) else round(keep * len(projected))
        rows[name] = choose(features, cls, received, count, generator).sort().values
    tokenizer, language = processor.tokenizer, model.model.language_model
    image, eos = model.config.image_token_id, tokenizer.eos_token_id
    by_length = defaultdict(list)
    prompts = []
    for i, record in enumerate(records):
        ids = tokenizer(prompt_of(processor, record.question), return_tensors="pt")["input_ids"][0]
        prompts.append(ids)
        by_length[len(ids), len(rows[record.picture_id]), len(seen[record.picture_id][0])].append(i)
    answers = [""] * len(records)
    embed = model.get_input_embeddings()
    for members in by_length.values():
        for j in range(0, len(members), batch):
            some = members[j : j + batch]
            embeds, positions = [], []
            for i in some:
                ids, kept = prompts[i], rows[records[i].picture_id]
                projected = seen[records[i].picture_id][0]
                at = int((ids == image).nonzero()[0, 0])
                before, after = embed(ids[:at]), embed(ids[at + 1 :])
                embeds.append(torch.cat([before, projected[kept], after]))
                old = torch.cat([torch.arange(at), at + kept, at + len(projected) + torch.arange(len(after))])
                positions.append(old if keep_positions else torch.arange(len(old)))
            hidden, position = torch.stack(embeds), torch.stack(positions)
            said, cache = [], None
            for _ in range(3):
                # An explicit mask: without one, gaps in the positions would be taken for packed sequences.
                length = hidden.shape[1] + (cache.get_seq_length() if cache is not None else 0)
                out = language(
                    inputs_embeds=hidden,
                    attention_mask=torch.ones(len(some), length, dtype=torch.long),
                    position_ids=position,
                    use_cache=True,
                    **with_cache(cache),
                )
                cache = returned_cache(out)
                token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
                said.append(token)
                hidden, position = embed(token[:, None]), position[:, -1:] + 1
            for i, tokens in zip(some, torch.stack(said, 1).tolist(), strict=True):
                tokens = tokens[: tokens.index(eos)] if eos in tokens else tokens
                answers[i] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return answers


def right(records: Iterable[Question], answers: Iterable[str]) -> np.ndarray:
    """Exact answers: (questions,) float 0 or 1."""
    return np.array([float(r.answer == a) for r, a in zip(records, answers, strict=True)])


def by_category(records: list[Question], correct: np.ndarray) -> dict[str, float]:
    """Accuracy of every category that occurs, and `all`."""
    table = {"all": float(correct.mean())}
    for category in CATEGORIES:
        mine = np.array([r.category == category for r in records])
        if mine.any():
            table[category] = float(correct[mine].mean())
    return table


def interval(records: list[Question], difference: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of a mean over questions, resampling whole pictures.

    With `difference` = right(A) - right(B) it is the paired interval of A - B.
    """
    pictures = [record.picture_id for record in records]
    return statistics.interval(statistics.Resampler(pictures, draws, seed).means(pictures, difference))
