"""From what the user named to a model on a device, and from pictures and a prompt to its inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.parts.templates import started_once
from vlmprune.runtime import interruption
from vlmprune.runtime.errors import CommandError, UserError, brief
from vlmprune.runtime.fewer_pixels import FewerPixels
from vlmprune.runtime.prompts import check_text
from vlmprune.runtime.status import note, quiet
from vlmprune.runtime.tables import counted
from vlmprune.runtime.videos import VideoClip

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from vlmprune.patches import Family
    from vlmprune.runtime.frames import FramesAsPictures

__all__ = ["Loaded", "find_model", "load", "model_inputs", "open_model", "pick_device"]

ADAPTER = "adapter_config.json"  # of PEFT
#: Of a processor: how many tokens beside the patches it counts, and whether the first of them is dropped.
CLS_TOKEN = ("num_additional_image_tokens", "vision_feature_select_strategy")
#: Processors that do without their own part for videos, which needs torchvision.
PICTURES_ALONE = (
    "LlavaOnevisionProcessor",
    "Qwen2VLProcessor",
    "Qwen2_5_VLProcessor",
    "Qwen3VLProcessor",
    "Glm4vProcessor",
)


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder (`local`) or an id on the hub; `embedded` models come with the package.

    `adapter` is the folder of a PEFT adapter that goes onto it.
    """

    name: str
    place: str
    local: bool
    embedded: bool = False
    adapter: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, with its processor."""

    source: Source
    model: Any
    processor: Any

    @property
    def about(self) -> dict[str, str]:
        """For a program."""
        return {
            "model": self.source.name,
            "family": self.model.config.model_type,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    @property
    def description(self) -> str:
        size = sum(p.numel() for p in self.model.parameters())
        return "{model} ({family}, {size:.3g} M parameters), {device}, {dtype}".format(**self.about, size=size / 1e6)


def find_model(name: str) -> Source:
    """Find out what `name` means: an embedded model, a folder, or an id on the hub.

    Raises:
        UserError: an embedded model whose weights are missing, no such folder, or a folder without a model.
    """
    from vlmprune import embedded
    from vlmprune.errors import did_you_mean

    if name in embedded.EVERY:
        try:
            return Source(name, str(embedded.path(name)), local=True, embedded=True)
        except FileNotFoundError as error:
            raise UserError(f"{brief(error)}; name another model with --model.") from None
    folder = Path(name).expanduser()
    if folder.is_dir():
        if is_adapter(folder):
            return with_adapter(name, folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json: it is not the folder of a model.")
        return Source(name, str(folder), local=True)
    if folder.exists():
        raise UserError(f"{folder} is a file, not the folder of a model.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        hint = did_you_mean(name, embedded.EVERY)
        raise UserError(
            f"no model {name!r}: no such folder, no embedded model ({', '.join(embedded.EVERY)}), and not an id "
            f"owner/name on the hub.{hint}"
        )
    return Source(name, name, local=False)


def is_adapter(folder: Path) -> bool:
    """Whether a folder has a PEFT adapter and no whole model."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def with_adapter(name: str, folder: Path) -> Source:
    """The base model that the adapter in a folder names, with the adapter on it.

    Raises:
        UserError: peft is missing, or the base model cannot be found, or is an adapter itself.
    """
    from importlib.util import find_spec

    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError("base_model_name_or_path is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is the folder of a PEFT adapter, and its {ADAPTER} does not say of which model "
            f"(base_model_name_or_path): {brief(error)}."
        ) from None
    if find_spec("peft") is None:
        raise UserError(
            f"{folder} is the folder of a PEFT adapter for {base}, not of a whole model: pip install peft, and both "
            "are loaded together; or merge them (merge_and_unload) and save the whole model."
        )
    if is_adapter(Path(base).expanduser()):
        raise UserError(
            f"{folder} is the folder of a PEFT adapter for {base}, which is an adapter itself: merge that one into its "
            "model (merge_and_unload), save the whole model, and name its folder as base_model_name_or_path."
        )
    try:
        source = find_model(base)
    except UserError as error:
        raise UserError(f"{folder} is the folder of a PEFT adapter for {base}: {error}") from None
    return replace(source, name=name, adapter=str(folder))


def pick_device(wanted: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        UserError: a device that this machine or this torch lacks.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = re.fullmatch(r"cuda(?::(\d+))?", wanted)
        if number is None or int(number[1] or 0) >= count:
            raise UserError(f"there is no device {wanted!r}: torch {torch.__version__} sees {count} CUDA devices.")
    elif wanted != "cpu":
        raise UserError(f"unknown device {wanted!r}: cpu, cuda, cuda:N or auto.")
    return wanted


def load(
    source: Source,
    device: str = "cpu",
    dtype: str = "auto",
    image_processor: Mapping[str, Any] | None = None,
    **options: Any,
) -> Loaded:
    """Load a model and its processor.

    Args:
        source: of `find_model`.
        device: of `pick_device`.
        dtype: "float32", "bfloat16", "float16" or "auto", which is the checkpoint's own on a GPU and float32 on a CPU.
        image_processor: other settings of the image processor, such as `max_pixels`. What the model's config has under
            the same name is set there too: LLaVA-NeXT packs crops by `image_grid_pinpoints`.
        **options: more for `from_pretrained`; a `device_map` places the model instead of `device`.

    Raises:
        UserError: not there, not reachable, not complete, or of a family that is not supported; a setting that its
            image processor does not know.
        CommandError: a release of transformers that is not supported.
    """
    check_release()
    where = "" if source.local else " from the Hugging Face hub"
    note(f"loading {source.name}{where} ...")
    with quiet(downloads=not source.local), told(source):
        refuse_original(source)
        given = dict(image_processor or {})
        processor = load_processor(source, type_of(source), local_files_only=source.local, **given)
        if getattr(processor, "image_processor", None) is None:
            raise UserError(f"{source.name} has no processor for pictures (processor_config.json).")
        check_settings(processor.image_processor, given)
        model, family = load_model(source, device, dtype, **options)
        interruption.check()
    for word in given.keys() & vars(model.config):
        setattr(model.config, word, given[word])
    fill_in(processor, family.processor_fields(family.inner(model)), source.name)
    placed = model if options.get("device_map") is not None else model.to(device)
    return Loaded(source, placed.eval(), processor)


def open_model(name: str, device: str, dtype: str, videos: bool = False) -> Loaded:
    """`load` what a user named, on the device that was named; raises as the three do.

    Args:
        videos: whether it is to read some.

    Raises:
        UserError: its family reads pictures alone.
    """
    source = find_model(name)
    if videos:
        refuse_videos(source)
    return load(source, pick_device(device), dtype)


def check_settings(image_processor: Any, given: Collection[str]) -> None:
    """Refuse settings that an image processor does not have: transformers takes any word, and drops it.

    Raises:
        UserError: one of those given; the message lists what there is.
    """
    from vlmprune.errors import did_you_mean

    known = sorted(image_processor.valid_kwargs.__annotations__)
    if strange := next((word for word in given if word not in known), None):
        hint, name = did_you_mean(strange, known), type(image_processor).__name__
        raise UserError(f"{name} has no setting {strange!r}.{hint} It has {', '.join(known)}.")


@contextmanager
def told(source: Source) -> Iterator[None]:
    """Around loading: transformers, the hub and safetensors raise nearly anything, and a user must hear it."""
    from vlmprune.errors import UnsupportedError

    try:
        yield
    except UnsupportedError as error:
        raise UserError(f"{source.name}: {error}") from None
    except UserError:
        raise
    except Exception as error:
        interruption.check(error)
        way = "" if source.local else " (no such folder here, and the hub could not help)"
        raise UserError(f"cannot load {source.name}{way}: {brief(error)}") from error


def type_of(source: Source) -> str:
    """The model's type, of the families that are supported.

    Raises:
        UserError: another one.
    """
    from transformers import AutoConfig

    from vlmprune.patches import FAMILIES

    kind = AutoConfig.from_pretrained(source.place, local_files_only=source.local).model_type
    if kind not in FAMILIES:
        raise UserError(
            f"{source.name} is a model of type {kind!r}, which is not supported. "
            f"Supported: {', '.join(FAMILIES)} (see `vlmprune ls models`)."
        )
    return kind


def refuse_videos(source: Source) -> None:
    """Refuse a model that reads no videos, before its weights are loaded.

    Raises:
        UserError: its family reads pictures alone, or is not supported.
    """
    from vlmprune.patches import FAMILIES

    with told(source):
        kind = type_of(source)
    if "video" not in FAMILIES[kind].modalities:
        able = ", ".join(name for name, family in FAMILIES.items() if "video" in family.modalities)
        raise UserError(f"models of type {kind!r} read no videos here, as {source.name} is; those that do: {able}.")


def load_model(source: Source, device: str, dtype: str, **options: Any) -> tuple[Any, Family]:
    """The model with its adapter, where `from_pretrained` puts it, and its family, whose facts it has."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vlmprune.patches import family_of

    if dtype == "auto" and not device.startswith("cuda"):
        dtype = "float32"
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    options["local_files_only"] = source.local
    model = AutoModelForImageTextToText.from_pretrained(source.place, dtype=wanted, **options)
    if source.adapter is not None:
        model.load_adapter(source.adapter)
    family = family_of(model)
    family.facts(family.inner(model))
    return model, family


def fill_in(processor: Any, fields: dict[str, Any], name: str) -> None:
    """Give the processor what its file lacks, or has wrong, of the model's own facts, and say so.

    Processors of older checkpoints lack `patch_size` and the like; without them placeholders and features do not match.
    """
    has = {field: getattr(processor, field, None) for field in fields}
    right = CLS_TOKEN if counts_without_cls(has) else ()
    changed = {field: value for field, value in fields.items() if has[field] != value and field not in right}
    for field, value in changed.items():
        setattr(processor, field, value)
    if changed:
        told = ", ".join(f"{field}={value!r} (was {has[field]!r})" for field, value in changed.items())
        note(f"{name}: the processor's file does not fit the model; from the model's config: {told}")


def counts_without_cls(has: dict[str, Any]) -> bool:
    """Whether a processor leaves out the [CLS] token on both sides, none added and none dropped: that counts right."""
    added, strategy = (has.get(field) for field in CLS_TOKEN)
    return added is not None and added - (strategy == "default") == 0


def check_release() -> None:
    """Refuse another transformers before it fails in words of its own.

    Raises:
        CommandError: with the way out.
    """
    from vlmprune._compat import check_transformers

    try:
        check_transformers()
    except ImportError as error:
        raise CommandError(str(error)) from None


def refuse_original(source: Source) -> None:
    """Refuse checkpoints of the original llava package, of which transformers would load the wrong half or nothing.

    Raises:
        UserError: with the two ways to run one.
        Exception: whatever transformers raises where there is no config.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(source.place, local_files_only=source.local)
    if "mm_vision_tower" in config:
        raise UserError(
            f"{source.name} is a checkpoint of the original llava package, which this command does not load. Give its "
            "Hugging Face conversion (llava-hf/... on the hub), or use Python: load it with "
            "llava.model.builder.load_pretrained_model and call vlmprune.patch(model, ...)."
        )


def load_processor(source: Source, model_type: str, **only: Any) -> Any:
    """The model's processor; with `FramesAsPictures` as its part for videos where its own cannot be had.

    transformers has no video processor that works without torchvision, and loads no processor that lacks a part.

    Raises:
        UserError: a family whose processor cannot do without.
        Exception: whatever transformers raises.
    """
    from importlib.util import find_spec

    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    from vlmprune.patches import FAMILIES

    if "video" not in FAMILIES[model_type].modalities or find_spec("torchvision") is not None:
        return transformers.AutoProcessor.from_pretrained(source.place, **only)
    name = PROCESSOR_MAPPING_NAMES[model_type]
    if name not in PICTURES_ALONE:
        raise UserError(
            f"the processor of {model_type} models needs torchvision, for its videos: install the torchvision that "
            "fits your torch."
        )
    whole = getattr(transformers, name)
    part = type(name, (whole,), {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])})
    processor = part.from_pretrained(source.place, **only)
    try:
        processor.video_processor = frames_as_pictures(source, processor.image_processor, model_type, **only)
    except UserError as error:
        note(f"no torchvision: images only, since {error}")
    return processor


def frames_as_pictures(source: Source, image_processor: Any, model_type: str, **only: Any) -> FramesAsPictures:
    """What prepares a model's videos in place of its video processor, whose settings it takes.

    Raises:
        UserError: there are none, or they cannot be followed.
    """
    from transformers.video_processing_utils import BaseVideoProcessor

    from vlmprune.runtime.frames import FramesAsPictures

    try:
        fields, _ = BaseVideoProcessor.get_video_processor_dict(source.place, **only)
    except OSError:
        raise UserError("the model has no settings of a video processor.") from None
    return FramesAsPictures(fields, image_processor, model_type)


def model_inputs(loaded: Loaded, visuals: Sequence[Image.Image | VideoClip], prompt: str) -> dict[str, Any]:
    """Prepare pictures, videos and a prompt as the model wants them, by its chat template where it has one.

    A prompt that has placeholders in it is taken as it is; else pictures come first, then videos.

    Raises:
        UserError: placeholders and pictures or videos do not match, or the processor cannot prepare them.
    """
    processor = loaded.processor
    images = [visual for visual in visuals if not isinstance(visual, VideoClip)]
    clips = [visual for visual in visuals if isinstance(visual, VideoClip)]
    check_text(prompt, "the prompt")
    if clips:
        check_video_part(loaded)
    text = prompt_text(processor, {"image": len(images), "video": len(clips)}, prompt)
    check_shapes(processor, images)
    given: dict[str, Any] = started_once(processor, text)
    if images:
        given["images"] = [images]  # in a list of their own: LLaVA-OneVision prepares several of one prompt differently
    if clips:
        given["videos"] = [list(clip.frames) for clip in clips]
        given |= {"video_metadata": [clip.about for clip in clips], "do_sample_frames": False}
    try:
        inputs = processor(text=text, return_tensors="pt", **given)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        what = " and ".join(filter(None, ("pictures" * bool(images), "videos" * bool(clips))))
        raise UserError(f"the model's processor cannot prepare these {what} and this prompt: {brief(error)}") from error
    return {name: moved(name, value, loaded.model) for name, value in inputs.items()}


def moved(name: str, value: Any, model: nn.Module) -> torch.Tensor:
    """A processor's number or numbers as a tensor on a model's device, pixels in its dtype."""
    import torch

    return torch.as_tensor(value).to(model.device, model.dtype if name.startswith("pixel_values") else None)


def check_video_part(loaded: Loaded) -> None:
    """Refuse videos where nothing prepares them, and say what does where it is not the model's own video processor.

    Raises:
        UserError: the processor has no part for them, or makes pictures smaller, which it would not do to videos.
    """
    from vlmprune.runtime.frames import FramesAsPictures

    if isinstance(loaded.processor.image_processor, FewerPixels):
        raise UserError("downsample makes pictures of this model smaller, and videos as they are: leave it out.")

    part = getattr(loaded.processor, "video_processor", None)
    if part is None:
        raise UserError(
            f"{loaded.source.name} has no video processor that can be used here: install the torchvision that fits "
            "your torch, and see that the model's files have its settings (video_preprocessor_config.json)."
        )
    if isinstance(part, FramesAsPictures):
        note("no torchvision: Pillow scales the frames, which the model's own video processor rounds differently")


def prompt_text(processor: Any, given: dict[str, int], prompt: str) -> str:
    """The prompt about so many of each kind, "image" and "video", with its placeholders.

    Raises:
        UserError: there are more or fewer of them than there are pictures or videos.
    """
    own = {kind: getattr(processor, f"{kind}_token", None) for kind in given}
    tokens = {kind: token or f"<{kind}>" for kind, token in own.items() if token or given[kind]}
    if any(token in prompt for token in tokens.values()):
        return agreeing(prompt, "the prompt has", tokens, given)
    if getattr(processor, "chat_template", None):
        content = [{"type": kind} for kind, count in given.items() for _ in range(count)]
        content.append({"type": "text", "text": prompt})
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return agreeing(text, "the model's chat template writes", tokens, given)
    return "".join(token * given[kind] for kind, token in tokens.items()) + f"\n{prompt}"


def agreeing(text: str, made: str, tokens: dict[str, str], given: dict[str, int]) -> str:
    """A text, found to have as many placeholders of each kind as there are pictures or videos.

    Raises:
        UserError: it has more or fewer.
    """
    for kind, token in tokens.items():
        if (written := text.count(token)) != (count := given[kind]):
            there = counted(count, {"image": "picture"}.get(kind, kind))
            raise UserError(f"{made} {written} {token}, and there {'is' if count == 1 else 'are'} {there}.")
    return text


def check_shapes(processor: Any, images: Sequence[Image.Image]) -> None:
    """Refuse pictures so long and narrow that scaling their shorter side to the tower's would not fit into memory.

    Processors of packed pictures bound the pixels of a whole picture instead.

    Raises:
        UserError: more pixels than Pillow takes for a bomb.
    """
    from PIL import Image

    whole = hasattr(processor.image_processor, "merge_size")
    edge = None if whole else (getattr(processor.image_processor, "size", None) or {}).get("shortest_edge")
    most = Image.MAX_IMAGE_PIXELS
    for image in images if edge and most else ():
        if (pixels := edge * edge * max(image.size) / min(image.size)) > 2 * most:
            raise UserError(
                f"a picture of {image.width} x {image.height} pixels is too long and narrow: with its shorter side "
                f"scaled to {edge}, as this model wants it, it would have {pixels:.2g} pixels. Cut it into pieces."
            )


def strange_pictures(loaded: Loaded, visuals: Sequence[Image.Image | VideoClip]) -> int:
    """How many pictures or videos an embedded model was not made for: it knows the drawn scenes it was trained on."""
    from vlmprune.embedded import looks_drawn

    first = (visual.frames[0] if isinstance(visual, VideoClip) else visual for visual in visuals)
    return sum(not looks_drawn(image) for image in first) if loaded.source.embedded else 0


def warn_of_photographs(name: str, count: int) -> None:
    """Say that an embedded model's answers about `count` pictures mean nothing."""
    if count:
        look = "looks" if count == 1 else "look"
        they = f"{counted(count, 'picture')} {look}"
        note(f"{name} knows drawn scenes only, and {they} like none: its answers about photographs mean nothing")


def warn_of_words(loaded: Loaded, prompts: Iterable[str]) -> None:
    """Name the words of prompts that an embedded model does not know."""
    known = dict.fromkeys(prompts) if loaded.source.embedded else ()
    if strange := list(dict.fromkeys(word for prompt in known for word in unknown_words(loaded, prompt))):
        note(f"{loaded.source.name} does not know these words: {', '.join(strange)}")


def unknown_words(loaded: Loaded, prompt: str) -> list[str]:
    """Words that an embedded model, which knows few, reads as <unk>."""
    tokenizer = loaded.processor.tokenizer
    words = dict.fromkeys(re.findall(r"[\w:]+|[^\w\s]", prompt.replace("<image>", " ")))
    return [w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False)["input_ids"]]
