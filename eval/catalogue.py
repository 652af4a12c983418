"""What there is: methods, those of other packages too, and the models that can be pruned."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, Field, fields, replace
from importlib import metadata
from typing import Any

from vlmprune import embedded, registry
from vlmprune.engine.compile import compile_cuts
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method
from vlmprune.parts.facts import ModelFacts
from vlmprune.parts.options import ranges
from vlmprune.patches import FAMILIES, REFUSED, Family
from vlmprune.patches.language_models import LANGUAGE_MODELS
from vlmprune.patches.towers import TOWERS
from vlmprune.runtime.errors import brief
from vlmprune.serving.choice import SERVED, refusals

__all__ = ["methods", "models"]

#: What a docstring says of some options.
ENTRY = re.compile(r"^    (\w+(?:, \w+)*): .*(?:\n     .*)*", re.MULTILINE)
#: What a budget per image is of: by whether a picture has several views.
WHOLE = {False: "a picture", True: "a picture, its thumbnail and crops together"}


def methods() -> list[dict[str, Any]]:
    """Every registered method; of one that cannot be loaded, the error."""
    offered = {point.name: point for point in metadata.entry_points(group=registry.ENTRY_POINTS)}
    found = []
    for name in registry.names():
        try:
            about = describe(name, registry.find(name))
        except Exception as error:  # another package's code: whatever it raises, the others are listed
            cause = error.__cause__ or error
            about = {"name": name, "error": f"{type(cause).__name__}: {brief(cause)}"}
        point = offered.get(name)
        about["from"] = (point.dist.name if point.dist else point.value) if point else "vlmprune"
        found.append(about)
    return found


def describe(name: str, cls: type) -> dict[str, Any]:
    """What a method's class says about itself."""
    options = {field.name: about_option(field) for field in fields(cls) if field.init}
    return {
        "name": name,
        "summary": cls.summary,
        "paper": cls.paper,
        "needs": cls.needs,
        "looks_at": cls.looks_at,
        "stage": cls.stage,
        "positions": options.get("positions", {}).get("default", "-") or "family",
        "syncs": cls.syncs,
        "training": cls.training,
        "vllm": served(cls),
        "options": json.loads(json.dumps(options, default=str)),
        "searched": {name: [one.low, one.high] for name, one in ranges(cls).items()},
        "doc": inspect.getdoc(cls) or "",
        "shared": shared(cls, set(options)),
    }


def shared(cls: type, options: set[str]) -> str:
    """What a method's base classes say of options that its own docstring does not name."""
    found = []
    for one in cls.__mro__:
        _, _, args = inspect.cleandoc(vars(one).get("__doc__") or "").partition("\nArgs:\n")
        for entry in ENTRY.finditer(args):
            if (names := {*entry[1].split(", ")} & options) and one is not cls:
                found.append(entry[0])
            options = options - names
    return "\n".join(found)


def about_option(field: Field) -> dict[str, Any]:
    """An option's type and default."""
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return {"type": kind} | ({} if field.default is MISSING else {"default": field.default})


def served(cls: type) -> str:
    """Whether vLLM can be given a method: "yes", "with tau=None", "on llava, ..." or why not."""
    why = refusals(cls)
    if len(why) == len(SERVED):
        return f"no: {why['llava_next']}"  # which has most of what methods ask for: crops, and a [CLS] token
    given = ", ".join(f"{key}={value}" for key, value in cls.served_with.items())
    if why:
        kept = ", ".join(name for name in SERVED if name not in why)
        return f"on {kept}{f' with {given}' if given else ''} (on others not: {next(iter(why.values()))})"
    return f"with {given}" if given else "yes"


def models() -> dict[str, Any]:
    """Families, towers and language models that are supported, and the embedded models."""
    return {
        "families": [about_family(family) for family in FAMILIES.values()],
        "towers": [about_tower(kind, has_cls) for kind, has_cls in TOWERS.items()],
        "language_models": list(LANGUAGE_MODELS),
        "refused": dict(REFUSED),
        "embedded": [about_embedded(name) for name in embedded.EVERY],
    }


def about_family(family: Family) -> dict[str, Any]:
    """A family, with what does not run on it."""
    return {
        "model_type": family.model_type,
        "title": family.title,
        "modalities": list(family.modalities),
        "usual_tower": family.usual_tower,
        "image": family.image or WHOLE[family.views],
        "refused_methods": refused(family.usual()),
        "refused_inputs": refused_inputs(family),
    }


def about_tower(kind: str, has_cls: bool) -> dict[str, Any]:
    """A kind of vision tower, with what does not run on it."""
    facts = replace(FAMILIES["llava_next"].usual(), has_cls=has_cls)
    return {"model_type": kind, "has_cls": has_cls, "refused_methods": refused(facts)}


def about_embedded(name: str) -> dict[str, Any]:
    """An embedded model, or why it is not there."""
    try:
        kind = json.loads((embedded.path(name) / "config.json").read_text())["model_type"]
    except FileNotFoundError as error:
        return {"name": name, "present": False, "why": brief(error)}
    return {"name": name, "family": kind, "present": True}


def loadable() -> Iterator[tuple[str, type[Method]]]:
    """The methods and their classes but for those that cannot be loaded, which `ls methods` reports."""
    for name in registry.names():
        with suppress(Exception):  # another package's code
            yield name, registry.find(name)


def refused(facts: ModelFacts) -> dict[str, str]:
    """Methods that do not run on such a model, by their own words."""
    why = {}
    for name, cls in loadable():
        try:
            if set(registry.required(cls)) <= {"keep"}:
                given = {"keep": 0.5} if "keep" in registry.options(cls) else {}
                compile_cuts([cls(**given, **cls.plain_with)], facts)
        except UnsupportedError as error:
            why[name] = str(error)
        except Exception:  # another package's code
            continue
    return why


def refused_inputs(family: Family) -> dict[str, dict[str, str]]:
    """Per kind of input that a family's models read: methods that do not run on it, by their own words."""
    kinds = {
        "videos": ["video"] * ("video" in family.modalities) + ["shrunk"] * ("video" in family.shrinks),
        "large images, whose canvas is shrunk": ["shrunk"] * ("image" in family.shrinks),
        **({family.single: ["single"]} if family.single else {}),
    }
    found: dict[str, dict[str, str]] = {}
    for name, cls in loadable():
        for kind, words in kinds.items():
            if word := next((word for word in words if word in cls.refuses_inputs), None):
                found.setdefault(kind, {})[name] = f"{name} {cls.refuses_inputs[word]}"
    return found
