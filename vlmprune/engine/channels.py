"""Every way in which data rides beside the calls, with who writes it, who reads it, and why there is no simpler one.

Nothing else in this package hands data on in keyword arguments of the host's, attributes of its objects, notes by
thread, or methods bound on an instance. A new way is a line here, and a reason to look for a simpler one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from vlmprune.engine.plan import Plan
    from vlmprune.parts.taps import Tap

__all__ = ["CHANNELS", "FRAME", "INSIDE", "NOTES", "OWNER", "SEEN", "SEGMENTS", "SIZES", "Channel", "Seen", "seen_on"]

FRAME = "vlmprune_frame"
INSIDE = "vlmprune_inside"
OWNER = "vlmprune_owner"
NOTES = "vlmprune_notes"
SEEN = "vlmprune_seen"
SIZES = "vlmprune_sizes"
SEGMENTS = "vlmprune_segments"


@dataclass(frozen=True)
class Seen:
    """What rides under SEEN.

    Attributes:
        plan: under which the tower's output was computed; None where nobody looked.
        taps: what was measured in the tower, by tap, `(views, patches, ...)`.
    """

    plan: Plan | None
    taps: dict[Tap, torch.Tensor]


def seen_on(output: Any) -> Seen:
    """What was seen where an encoder's output was computed."""
    return getattr(output, SEEN, None) or Seen(None, {})


@dataclass(frozen=True)
class Channel:
    """One way in which data rides beside the calls.

    Attributes:
        name: the keyword or attribute, or the object that holds the data.
        kind: "keyword" of a host's module, "attribute" of a host's object, "thread" notes, "bound" method of an
            instance, or "tag" on a tensor.
        carries: what it is.
        writer: who writes it; reader: who reads it.
        why: why it cannot be handed on in a simpler way.
    """

    name: str
    kind: Literal["keyword", "attribute", "thread", "bound", "tag"]
    carries: str
    writer: str
    reader: str
    why: str


CHANNELS: tuple[Channel, ...] = (
    Channel(
        FRAME,
        "keyword",
        "the frame of this call: TowerFrame in the tower, Prefill or Decode in the language model",
        "hooks.BeforeModel, decode.resume, tower.BeforeTower",
        "hooks.BeforeLayer, hooks.AfterLanguageModel, hooks.AfterModel, tower.BeforeTowerLayer, tower.AfterTower",
        "hosts hand unknown keyword arguments down to every layer, so that calls and threads cannot mix",
    ),
    Channel(
        OWNER,
        "keyword",
        "encode.Call: whose call a tower is in, and the layouts of what it encodes",
        "encode.Encode",
        "tower.BeforeTower",
        "several models may share a tower, and its pixels say neither whose they are nor which views are one picture",
    ),
    Channel(
        INSIDE,
        "keyword",
        "tower.Inside: the cut between a tower layer's attention and its feed-forward block",
        "tower.BeforeTowerLayer",
        "tower.BeforeTowerAttention",
        "a layer hands its keyword arguments on to its attention, which is where such a cut acts",
    ),
    Channel(
        NOTES,
        "keyword",
        "Notes: the encoders' own outputs, and how many tokens at the end of the prompt are guesses",
        "hooks.BeforeHead",
        "hooks.BeforeModel",
        "the inner model is not handed logits_to_keep, and accelerate copies outputs without their attributes",
    ),
    Channel(
        SEEN,
        "attribute",
        "Seen: measured tower taps and under which plan, on the tower's output (or a tag's note: see Tagged)",
        "tower.AfterTower",
        "prefill.Prefill, census.count_prompts, patches.llava_llama.Prompt",
        "the output comes back with the features, from generate too; these may be used under another patch",
    ),
    Channel(
        SIZES,
        "attribute",
        "what the packing of every image or video depends on, on the output of get_image_features",
        "encode.Encode, patches.llava_llama.Prompt",
        "prompt.prompt_layout",
        "generate throws image sizes away before any module is called",
    ),
    Channel(
        SEGMENTS,
        "attribute",
        "decode state: what the layers from each cut on hold of the conversation, on the cache it describes",
        "prefill.Prefill.finish, decode",
        "hooks.BeforeModel, decode",
        "the cache is what a later call brings, and deepcopy carries its attributes",
    ),
    Channel(
        "Plan.plain",
        "thread",
        "which threads are inside handle.disabled()",
        "api.Handle.disabled",
        "hooks.BeforeModel, hooks.BeforeHead, tower.BeforeTower",
        "the block switches pruning off for the calls of one thread, which pass nothing of ours",
    ),
    Channel(
        "Watch",
        "thread",
        "the frame, for hooks on modules inside a layer, or inside a tower, during its call",
        "hooks.BeforeLayer, tower.BeforeTowerLayer, tower.BeforeTower",
        "hooks.AfterBlock, tower.AfterProjection, tower.BeforeTowerLayer",
        "feed-forward blocks and projections get no keyword arguments, nor do the layers of some towers",
    ),
    Channel(
        "Bound",
        "bound",
        "Encode before get_image_features and get_video_features; ExpandPrompt of the original llava package",
        "engine.install",
        "the host's own calls of these methods",
        "no module is called with image sizes, or with a prompt before it is expanded",
    ),
    Channel(
        "Tagged",
        "tag",
        "patches.llava_llama.Prompt, on pixels and embeddings of the original llava package",
        "patches.llava_llama.ExpandPrompt",
        "patches.llava_llama.LlavaLlama.open, tower.BeforeTower",
        "that host hands on tensors and nothing else",
    ),
)
