"""Every way in which data rides beside the calls, with who writes it, who reads it, and why there is no simpler one.

Nothing else in this package hands data on in keyword arguments of the host's, attributes of its objects, notes by
thread, or methods bound on an instance. A new way is a line here, and a reason to look for a simpler one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CHANNELS", "FRAME", "NOTES", "SEEN", "SEGMENTS", "SIZES", "Channel"]

FRAME = "vlmprune_frame"
NOTES = "vlmprune_notes"
SEEN = "vlmprune_seen"
SIZES = "vlmprune_sizes"
SEGMENTS = "vlmprune_segments"


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
        "measured tower taps, by tap, on the tower's output object (on the note of a tag where a host returns tensors)",
        "tower.AfterTower",
        "prefill.Prefill, census.count_prompts, patches.llava_llama.Prompt",
        "the output object is what comes back with the features, from generate too",
    ),
    Channel(
        SIZES,
        "attribute",
        "what the packing of every image or video depends on, on the output of get_image_features",
        "tower.RememberSizes, patches.llava_llama.Prompt",
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
        "the frame, for hooks on modules inside a layer during its call",
        "hooks.BeforeLayer, tower.BeforeTowerLayer",
        "hooks.AfterBlock, tower.AfterKeys",
        "feed-forward blocks and projections get no keyword arguments",
    ),
    Channel(
        "Bound",
        "bound",
        "RememberSizes before get_image_features and get_video_features; ExpandPrompt of the original llava package",
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
