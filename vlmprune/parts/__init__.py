"""What methods are composed of: pure tensor code that knows no host and no engine, under any transformers.

`from vlmprune.parts import ...` has what an author of a method needs. Each name is imported when it is first asked for,
so that what reads budgets or options alone does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_PARTS = ("attention", "budget", "cells", "clip", "coverage", "cuts", "decoder_taps", "diversity", "facts", "layers")
_PARTS += ("layout", "merging", "options", "schedules", "scores", "selection", "taps", "templates", "text_taps")
_PARTS += "vector_taps"
_HOMES = ("errors", *(f"parts.{name}" for name in _PARTS))

if TYPE_CHECKING:
    from vlmprune.errors import UnsupportedError
    from vlmprune.parts.attention import Visible, attention_mass, last_rows, mean_weight, take_rows, upcast
    from vlmprune.parts.budget import HAIR, count, floored, share
    from vlmprune.parts.cells import adjacent, image_cells, laid_out, nested_cells, regions, square_cells
    from vlmprune.parts.clip import Clip, clip_for, told_clip
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
    from vlmprune.parts.decoder_taps import PIVOTS, BesidePivots, KeyLengths, Transition, TransitionMode
    from vlmprune.parts.diversity import greedy_diversity, most_apart, select_diverse, select_weighted
    from vlmprune.parts.facts import (
        ModelFacts,
        check_layer,
        need_cls,
        need_crops,
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
        nearest_mean,
        peaks,
        recycle,
        spread_evenly,
    )
    from vlmprune.parts.options import (
        Layers,
        Must,
        Positive,
        Range,
        Ratios,
        Seed,
        Share,
        Weight,
        Whole,
        ascending,
        falling,
        is_number,
        is_whole,
        layer_of,
        whole,
    )
    from vlmprune.parts.schedules import DEPTH, Scaled, Schedule, decoder_cuts, nearest
    from vlmprune.parts.scores import Ensemble, ensemble_scores, outlying, random_scores
    from vlmprune.parts.selection import (
        AnyNewlines,
        Newlines,
        Scope,
        by_view,
        candidates,
        capped,
        contest,
        keep_patches,
        select,
        select_each,
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
        TowerTap,
        VisionAttention,
        decoder_mass,
        visual_entries,
    )
    from vlmprune.parts.templates import QuestionMarks, question_of, system_prefix, told_question, told_system
    from vlmprune.parts.text_taps import MeanState, OwnText, QuestionIds, QuestionWords, Rated, Raters, queries
    from vlmprune.parts.vector_taps import (
        ContextRelevance,
        Density,
        Outlying,
        PageRank,
        WholeKeys,
        WholeRow,
        features_of,
        row_of,
    )

__all__ = [
    "DEPTH",
    "HAIR",
    "PIVOTS",
    "AnyCut",
    "AnyNewlines",
    "BesidePivots",
    "BlockFlow",
    "BlockKeys",
    "BlockTap",
    "Carried",
    "Clip",
    "ClsLogits",
    "ClusterOf",
    "Clusters",
    "ContextRelevance",
    "Cover",
    "CrossShare",
    "Cut",
    "Decoder",
    "DecoderLayer",
    "DecoderTap",
    "Density",
    "Distinctness",
    "Ensemble",
    "Hidden",
    "ImageGrid",
    "Inputs",
    "Kept",
    "KeyLengths",
    "Layers",
    "Layout",
    "MeanState",
    "Merge",
    "ModelFacts",
    "Must",
    "Newlines",
    "Outlying",
    "OwnText",
    "PageRank",
    "PatchCut",
    "Pick",
    "PixelCut",
    "Pixels",
    "Positions",
    "Positive",
    "ProjectorCut",
    "QuestionIds",
    "QuestionMarks",
    "QuestionWords",
    "Range",
    "Rated",
    "Raters",
    "Ratios",
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
    "TowerCut",
    "TowerLayer",
    "TowerTap",
    "Transition",
    "TransitionMode",
    "UnsupportedError",
    "Views",
    "Visible",
    "Vision",
    "VisionAttention",
    "Weight",
    "Whole",
    "WholeKeys",
    "WholeRow",
    "adjacent",
    "ascending",
    "attention_mass",
    "by_view",
    "candidates",
    "capped",
    "check_layer",
    "clip_for",
    "contest",
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
    "layer_of",
    "match_alternating",
    "match_energy",
    "mean_weight",
    "most_apart",
    "nearest",
    "nearest_mean",
    "need_cls",
    "need_crops",
    "need_patches",
    "need_views",
    "nested_cells",
    "outlying",
    "peaks",
    "queries",
    "question_of",
    "random_scores",
    "recycle",
    "regions",
    "row_of",
    "scale_tower_layer",
    "schedule_layers",
    "select",
    "select_covering",
    "select_diverse",
    "select_each",
    "select_rows",
    "select_weighted",
    "share",
    "spread_evenly",
    "square_cells",
    "stride",
    "system_prefix",
    "take_rows",
    "told_clip",
    "told_question",
    "told_system",
    "top_k",
    "upcast",
    "upload",
    "visual_entries",
    "whole",
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
