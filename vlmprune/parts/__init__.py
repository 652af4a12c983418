"""What methods are composed of: pure tensor code that knows no host and no engine, under any transformers.

`from vlmprune.parts import ...` has what an author of a method needs. Each name is imported when it is first asked for,
so that what reads budgets or options alone does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_PARTS = ("attention", "budget", "cells", "clip", "coverage", "cuts", "diversity", "facts", "layers", "layout")
_PARTS += ("merging", "options", "schedules", "scores", "selection", "taps", "templates", "text_taps", "vector_taps")
_HOMES = ("errors", *(f"parts.{name}" for name in _PARTS))

if TYPE_CHECKING:
    from vlmprune.errors import UnsupportedError
    from vlmprune.parts.attention import Visible, attention_mass, last_rows, mean_weight, take_rows, upcast
    from vlmprune.parts.budget import HAIR, count, floored, share
    from vlmprune.parts.cells import image_cells, laid_out, nested_cells
    from vlmprune.parts.clip import Clip, clip_from
    from vlmprune.parts.coverage import Cover, select_covering
    from vlmprune.parts.cuts import (
        AnyCut,
        Clusters,
        Cut,
        Decoder,
        Merge,
        PatchCut,
        Pick,
        PixelCut,
        Positions,
        ProjectorCut,
        Reduction,
        Stay,
        TowerCut,
        Vision,
        schedule_layers,
    )
    from vlmprune.parts.diversity import greedy_diversity, most_apart, select_diverse, weighted_det
    from vlmprune.parts.facts import (
        ModelFacts,
        check_layer,
        need_cls,
        need_patches,
        need_views,
        scale_tower_layer,
    )
    from vlmprune.parts.layers import DecoderLayer, Scene, TowerLayer
    from vlmprune.parts.layout import ImageGrid, Layout, Views, download, frames_of, upload
    from vlmprune.parts.merging import (
        first_of_cluster,
        gather_to,
        match_alternating,
        match_energy,
        peaks,
        spread_evenly,
    )
    from vlmprune.parts.options import Must, Range, Seed, Share, ascending, falling, is_number, is_whole
    from vlmprune.parts.schedules import DEPTH, Scaled, Schedule, decoder_cuts, nearest
    from vlmprune.parts.scores import Ensemble, ensemble_scores, random_scores
    from vlmprune.parts.selection import (
        AnyNewlines,
        Newlines,
        Scope,
        by_view,
        candidates,
        capped,
        keep_patches,
        select,
        select_rows,
        stride,
        top_k,
    )
    from vlmprune.parts.taps import (
        BlockFlow,
        BlockKeys,
        BlockTap,
        Carried,
        ClsLogits,
        ClusterOf,
        CrossShare,
        DecoderTap,
        Distinctness,
        Hidden,
        Inputs,
        Kept,
        Pixels,
        ReceivedAttention,
        Seen,
        Tap,
        TextAttention,
        TextFlow,
        TowerTap,
        VisionAttention,
        decoder_mass,
    )
    from vlmprune.parts.templates import QuestionMarks, question_of, system_prefix, told_question
    from vlmprune.parts.text_taps import OwnText, QuestionIds, QuestionWords
    from vlmprune.parts.vector_taps import WholeKeys, WholeRow, features_of, row_of

__all__ = [
    "DEPTH",
    "HAIR",
    "AnyCut",
    "AnyNewlines",
    "BlockFlow",
    "BlockKeys",
    "BlockTap",
    "Carried",
    "Clip",
    "ClsLogits",
    "ClusterOf",
    "Clusters",
    "Cover",
    "CrossShare",
    "Cut",
    "Decoder",
    "DecoderLayer",
    "DecoderTap",
    "Distinctness",
    "Ensemble",
    "Hidden",
    "ImageGrid",
    "Inputs",
    "Kept",
    "Layout",
    "Merge",
    "ModelFacts",
    "Must",
    "Newlines",
    "OwnText",
    "PatchCut",
    "Pick",
    "PixelCut",
    "Pixels",
    "Positions",
    "ProjectorCut",
    "QuestionIds",
    "QuestionMarks",
    "QuestionWords",
    "Range",
    "ReceivedAttention",
    "Reduction",
    "Scaled",
    "Scene",
    "Schedule",
    "Scope",
    "Seed",
    "Seen",
    "Share",
    "Stay",
    "Tap",
    "TextAttention",
    "TextFlow",
    "TowerCut",
    "TowerLayer",
    "TowerTap",
    "UnsupportedError",
    "Views",
    "Visible",
    "Vision",
    "VisionAttention",
    "WholeKeys",
    "WholeRow",
    "ascending",
    "attention_mass",
    "by_view",
    "candidates",
    "capped",
    "check_layer",
    "clip_from",
    "count",
    "decoder_cuts",
    "decoder_mass",
    "download",
    "ensemble_scores",
    "falling",
    "features_of",
    "first_of_cluster",
    "floored",
    "frames_of",
    "gather_to",
    "greedy_diversity",
    "image_cells",
    "is_number",
    "is_whole",
    "keep_patches",
    "laid_out",
    "last_rows",
    "match_alternating",
    "match_energy",
    "mean_weight",
    "most_apart",
    "nearest",
    "need_cls",
    "need_patches",
    "need_views",
    "nested_cells",
    "peaks",
    "question_of",
    "random_scores",
    "row_of",
    "scale_tower_layer",
    "schedule_layers",
    "select",
    "select_covering",
    "select_diverse",
    "select_rows",
    "share",
    "spread_evenly",
    "stride",
    "system_prefix",
    "take_rows",
    "told_question",
    "top_k",
    "upcast",
    "upload",
    "weighted_det",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        for home in (import_module(f"vlmprune.{home}") for home in _HOMES):
            if name in home.__all__:
                value = globals()[name] = getattr(home, name)
                return value
    raise AttributeError(f"module 'vlmprune.parts' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
