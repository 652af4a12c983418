"""scene-qwen: pictures of any size, the model and its processor, and how it is taught. Its scenes have shapes alone.

The tower is supervised token by token behind its merger, then frozen but for the merger, and the language model learns
from many turns behind one picture: one row, in which every turn sees the picture and itself and its positions restart
behind the picture, computed by the host's own layers under a mask that says so.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

from vlmprune.eval.testbed.words import COLOUR_NAMES, QWEN_CHAT_TEMPLATE, QWEN_VOCABULARY, VALUES

from .models import tokenizer
from .scenes import Scene, loose_scene, quadrant_scene
from .tower import PIXEL_MEAN, PIXEL_STD

PATCH, MERGE, FRAMES = 8, 2, 2
#: Side of what one visual token sees, in pixels.
CELL = PATCH * MERGE
NO_COLOUR, NO_VALUE = len(COLOUR_NAMES), len(VALUES)
#: Columns of the heads that supervise tokens: colour, value, eighth of the height, of the width.
HEADS = {"colour": NO_COLOUR + 1, "value": NO_VALUE + 1, "row": 8, "column": 8}
_INDEX = {word: i for i, word in enumerate(QWEN_VOCABULARY)}
_PARTS = ["image_processor", "tokenizer"]
_BEFORE = [_INDEX[word] for word in ("<s>", "user:", "<vision>")]


def config() -> Qwen2_5_VLConfig:
    """Tower: windows of 4 x 4 tokens in layers 0 and 2, the whole picture in 1 and 3. Language model: 4 layers."""
    index = _INDEX.__getitem__
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "window_size": 4 * CELL,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 128,
        },
        text_config={
            "vocab_size": len(QWEN_VOCABULARY),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            # Width has the slowest frequencies: with the usual theta ten tokens would be no angle at all.
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": index("<s>"),
            "eos_token_id": index("</s>"),
            "pad_token_id": index("<pad>"),
        },
        image_token_id=index("<image>"),
        video_token_id=index("<video>"),
        vision_start_token_id=index("<vision>"),
        vision_end_token_id=index("</vision>"),
        bos_token_id=index("<s>"),
        eos_token_id=index("</s>"),
        pad_token_id=index("<pad>"),
        tie_word_embeddings=False,
    )


def model() -> Qwen2_5_VLForConditionalGeneration:
    """An untrained scene-qwen."""
    host = Qwen2_5_VLForConditionalGeneration(config())
    host.set_attn_implementation("eager")  # at this size the fastest to train
    return host


#: What the processors of pictures and of videos share.
_PIXELS = {
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "image_mean": [PIXEL_MEAN] * 3,
    "image_std": [PIXEL_STD] * 3,
}
#: From 4 to 256 tokens a picture.
SIZE = {"shortest_edge": 4 * CELL**2, "longest_edge": 256 * CELL**2}


def processor() -> Qwen2_5_VLProcessor:
    """The processor that goes with `model`, for pictures: its part for videos needs torchvision."""
    kind = type("Qwen2_5_VLProcessor", (Qwen2_5_VLProcessor,), {"get_attributes": classmethod(lambda _: _PARTS)})
    words = tokenizer(QWEN_VOCABULARY, video_token="<video>", vision_bos_token="<vision>", vision_eos_token="</vision>")
    return kind(Qwen2VLImageProcessorPil(size=SIZE, **_PIXELS), words, chat_template=QWEN_CHAT_TEMPLATE)


def save_processor(folder: Path) -> None:
    """Writes the processor, with the part for videos that this environment may be unable to make."""
    processor().save_pretrained(folder)
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["video_processor"] = settings["image_processor"] | {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": {"shortest_edge": SIZE["shortest_edge"], "longest_edge": 4 * SIZE["longest_edge"]},
    }
    del settings["video_processor"]["image_processor_type"]
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def draw_grid(rng: np.random.Generator) -> tuple[int, int]:
    """Rows and columns of tokens: 84 to 112 or so, from 6 x 16 to 16 x 6."""
    rows = int(rng.integers(6, 17))
    return rows, int(np.clip(round(rng.uniform(84, 112) / rows), 6, 16))


def scene(rng: np.random.Generator, rows: int, columns: int, **options) -> Scene:
    """A scene that fills the grid: one in four is drawn a few pixels larger or smaller and resized, as pictures are."""
    height, width = rows * CELL, columns * CELL
    change = (rng.integers(-7, 8, 2) if rng.random() < 0.25 else np.zeros(2)).astype(int)
    options = {"size": (18, 26), "digits": 0.0} | options
    found = quadrant_scene(rng, width=width + int(change[0]), height=height + int(change[1]), lit=True, **options)
    if change.any():
        found.pixels = np.asarray(found.image().resize((width, height), Image.Resampling.BICUBIC))
        found.owner = np.asarray(Image.fromarray(found.owner).resize((width, height), Image.Resampling.NEAREST))
    return found


def full_scene(rng: np.random.Generator, rows: int, columns: int) -> Scene:
    """A picture full of objects, for the tower: it teaches most in a second."""
    cells = max(round(rows / 2.1), 1), max(round(columns / 2.1), 1)
    size = {"width": columns * CELL, "height": rows * CELL}
    return loose_scene(rng, cells=cells, fill=rng.uniform(0.4, 0.9), size=(17, 28), lit=True, digits=0.0, **size)


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B * patches, 3 * 2 * 8 * 8) float32, as the image processor does."""
    batch, height, width, _ = pixels.shape
    scaled = (pixels.permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD
    cells = scaled.reshape(batch, 3, height // CELL, MERGE, PATCH, width // CELL, MERGE, PATCH)
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return cells.unsqueeze(6).expand(*cells.shape[:6], FRAMES, PATCH, PATCH).flatten(0, 4).flatten(1)


def grids(batch: int, rows: int, columns: int) -> torch.Tensor:
    """image_grid_thw of equally large pictures."""
    return torch.tensor([[1, rows * MERGE, columns * MERGE]]).expand(batch, 3)


def owners(found: Scene, rows: int, columns: int, minimum: int = 20) -> np.ndarray:
    """Which thing each token shows, (rows * columns,) int64: 0 where no thing covers `minimum` pixels of it."""
    cells = found.owner.reshape(rows, CELL, columns, CELL).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    counts = np.stack([(cells == kind).sum(1) for kind in range(1, len(found.things) + 1)], 1)
    best = counts.argmax(1)
    return np.where(counts[np.arange(len(best)), best] >= minimum, best + 1, 0)


def targets(found: Scene, rows: int, columns: int) -> np.ndarray:
    """Colour, value, eighth of the height and of the width, for every token: (rows * columns, 4) int64."""
    owner = owners(found, rows, columns)
    colours = np.array([NO_COLOUR, *(COLOUR_NAMES.index(t.colour) for t in found.things)])
    values = np.array([NO_VALUE, *(VALUES.index(t.value) for t in found.things)])
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.stack([colours[owner], values[owner], row * 8 // rows, column * 8 // columns], 1)


class SupervisedTower(nn.Module):
    """The tower with classification heads on its merged tokens."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.norm = nn.LayerNorm(tower.config.out_hidden_size, elementwise_affine=False)
        self.head = nn.Linear(tower.config.out_hidden_size, sum(HEADS.values()))

    def forward(
        self, pixels: torch.Tensor, grid: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Losses by name, and which of colour, value, row and column are right: (tokens, 4) bool."""
        merged = self.tower(pixels, grid_thw=grid).pooler_output
        logits = self.head(self.norm(merged.float())).split(list(HEADS.values()), -1)
        wanted = wanted.flatten(0, 1)
        thing = wanted[:, 0] != NO_COLOUR
        losses = {}
        for i, (name, said) in enumerate(zip(HEADS, logits, strict=True)):
            each = functional.cross_entropy(said.float(), wanted[:, i], reduction="none")
            if i < 2:
                losses[name] = each[thing].mean() + 0.5 * each[~thing].mean()
            else:
                losses[name] = 0.15 * each.mean()
        right = torch.stack([said.argmax(-1) for said in logits], 1) == wanted
        return losses, right


def received(tower: nn.Module, layer: int, pixels: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Runs the tower on pictures of one size and looks into a layer of it that sees all of a picture.

    Returns:
        (B, tokens) the attention that every token receives, mean over heads and all patches that look, and what the
        tower makes of the pictures, (B * tokens, D).
    """
    caught: dict = {}
    block = tower.blocks[layer]
    hook = block.register_forward_pre_hook(lambda _, args, kw: caught.update(kw, hidden=args[0]), with_kwargs=True)
    merged = tower(pixels, grid_thw=grid).pooler_output
    hook.remove()
    attention, hidden = block.attn, block.norm1(caught["hidden"])
    query, key, _ = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(query, key, *caught["position_embeddings"])
    query, key = (x.unflatten(0, (len(grid), -1)).transpose(1, 2).float() for x in (query, key))
    weights = (query @ key.mT * attention.scaling).softmax(-1).mean((1, 2))
    window = get_vision_window_index(grid[:1], MERGE, tower.window_size, PATCH)[0]
    return weights.unflatten(1, (-1, MERGE**2)).sum(2)[:, window.argsort()], merged


def positions(rows: int, columns: int, groups: list[torch.Tensor], shift: int) -> torch.Tensor:
    """M-RoPE positions of `<s> user: <vision> image </vision>` and of the turns behind it: (3, 1, N)."""
    start = len(_BEFORE)
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    picture = torch.stack([torch.zeros_like(row), row, column]) + start
    after = start + max(rows, columns)
    text = [torch.arange(g.shape[2]).repeat(g.shape[1]) + after + 1 + shift for g in groups]
    line = torch.cat([torch.tensor([after]), *text])
    return torch.cat([torch.arange(start).expand(3, -1), picture, line.expand(3, -1)], 1)[:, None]


def visible(start: int, groups: list[torch.Tensor]) -> torch.Tensor:
    """Who sees whom, (1, 1, N, N) float, added to scores: causally, every turn the prefix and itself."""
    lengths = [start] + [g.shape[2] for g in groups for _ in range(g.shape[1])]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    seen = ((owner[:, None] == owner[None]) | (owner == 0)[None]) & causal
    return torch.zeros(seen.shape).masked_fill(~seen, -1e4)[None, None]


def logits(
    host: Qwen2_5_VLForConditionalGeneration,
    states: torch.Tensor,
    rows: int,
    columns: int,
    groups: list[torch.Tensor],
    shift: int = 0,
) -> list[torch.Tensor]:
    """Next-token logits of every turn.

    Args:
        host: a scene-qwen.
        states: (B, rows * columns, D), merged tokens.
        rows: of tokens.
        columns: of tokens.
        groups: groups of equally long turns, each (B, n, L) token ids.
        shift: added to all positions of the turns, as an earlier turn would.

    Returns:
        One (B, n, L, vocabulary) tensor a group.
    """
    language = host.model.language_model
    batch = len(states)
    before = language.embed_tokens(torch.tensor(_BEFORE)).expand(batch, -1, -1)
    end = language.embed_tokens(torch.tensor([_INDEX["</vision>"]])).expand(batch, -1, -1)
    parts = [before, states, end, *(language.embed_tokens(g).flatten(1, 2) for g in groups)]
    hidden = torch.cat([p.to(before.dtype) for p in parts], 1)
    start = before.shape[1] + states.shape[1] + 1
    out = language(
        inputs_embeds=hidden,
        attention_mask=visible(start, groups).expand(batch, 1, -1, -1),
        position_ids=positions(rows, columns, groups, shift).expand(3, batch, -1),
        use_cache=False,
    ).last_hidden_state[:, start:]
    said = host.lm_head(out).float().split([g.shape[1] * g.shape[2] for g in groups], 1)
    return [x.unflatten(1, g.shape[1:]) for x, g in zip(said, groups, strict=True)]
