"""The families beyond LLaVA: tiny models, what they are shown, and what cannot be had on them."""

from __future__ import annotations

from functools import partial

from scenes import OPTIONS, REPEATS

from kin.family import BOTH, FILMS, Kin
from kin.models import (
    TILES,
    aya_vision,
    cohere2_vision,
    deepseek_vl,
    filled_up,
    gemma3,
    grid,
    internvl,
    listed,
    llava_pixtral,
    mistral3,
    ovis2,
    paligemma,
    parts,
    pixtral,
    side_by_side,
    smolvlm,
    squares,
    tiles,
    video_llava,
    views,
)
from vlmprune import registry
from vlmprune.parts import ModelFacts, ProjectorCut, TowerCut


def merges_in_tower(name: str) -> bool:
    """Whether a method makes cuts in the tower of LLaVA-1.5, or behind it."""
    facts = ModelFacts("llava", 24, 22, True, decoder_layers=32, views=True, view_patches=576)
    made = registry.find(name)(**(OPTIONS[name](None) if name in OPTIONS else {"keep": 0.3})).cuts(facts)
    return any(isinstance(cut, TowerCut | ProjectorCut) for cut in made)


WHOLE = {
    "globalcom2": "globalcom2 shares a budget among the crops of an image",
    "globalcom2_fixed": "globalcom2_fixed shares a budget among the crops of an image",
    "lrs": "lrs chooses among the crops of an image",
}
#: Methods that merge or pick patches in the vision tower or behind it: what leaves it is no longer what it would be.
IN_TOWER = [name for name in registry.names() if name not in ("atp", *REPEATS) and merges_in_tower(name)]
#: What cannot be had where a token is no patch of the tower as its layers leave it.
UNLIKE = WHOLE | dict.fromkeys(IN_TOWER, "merges patches in or behind")
NO_SCREENS = WHOLE | {"showui": "frames of a video are no screenshots"}
PACKED = UNLIKE | dict.fromkeys(("downsample", "showui", *IN_TOWER), "packs pictures of any size")
SHORT = "sees the last 24 tokens alone"
NORMED = UNLIKE | {"transprune": "puts that through norms", "atp": SHORT, "sparsevlm": SHORT}

KIN: dict[str, Kin] = {
    kin.name: kin
    for kin in (
        Kin("internvl", internvl, tiles, lambda n: [9 * TILES[n]], has_cls=True, refused=UNLIKE),
        Kin(
            "internvl-qwen3", partial(internvl, "qwen3"), tiles, lambda n: [9 * TILES[n]], has_cls=True, refused=UNLIKE
        ),
        Kin("deepseek_vl", deepseek_vl, views, lambda n: [16], refused=UNLIKE),
        Kin("aya_vision", aya_vision, tiles, parts, refused=UNLIKE),
        Kin("cohere2_vision", cohere2_vision, tiles, parts, refused=UNLIKE),
        Kin("mistral3", mistral3, pixtral, grid(12), whole=True, join=side_by_side, refused=PACKED),
        Kin(
            "llava-pixtral",
            llava_pixtral,
            pixtral,
            grid(6),
            whole=True,
            join=side_by_side,
            refused=PACKED,
        ),
        Kin("smolvlm", smolvlm, listed, parts, join=filled_up, refused=UNLIKE),
        Kin("idefics3", partial(smolvlm, "Idefics3"), listed, parts, join=filled_up, refused=UNLIKE),
        Kin("ovis2", ovis2, tiles, parts, refused=UNLIKE),
        Kin("gemma3", gemma3, squares, lambda n: [9], blocks=True, refused=NORMED),
        Kin("paligemma", paligemma, views, lambda n: [16], prefix=True, origin=1, tolerance=1e-6, refused=UNLIKE),
        Kin("video_llava", video_llava, views, lambda n: [16], has_cls=True, shows=BOTH, refused=NO_SCREENS),
        Kin("video_llava-video", video_llava, views, lambda n: [16], has_cls=True, shows=FILMS, refused=NO_SCREENS),
    )
}
