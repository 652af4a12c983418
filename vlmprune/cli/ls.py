"""`vlmprune ls`: the methods and models there are."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument

from vlmprune.cli import flags
from vlmprune.runtime.errors import UserError, brief

if TYPE_CHECKING:
    from vlmprune.methods.base import Method
    from vlmprune.parts.facts import ModelFacts
    from vlmprune.patches import Family

__all__ = ["verb"]

EXAMPLES = """\
examples:
  vlmprune ls methods
  vlmprune ls methods fopru      one method with all its options
  vlmprune ls models --json
"""
FACTS = ("needs", "stage", "positions", "syncs", "training")
#: What a budget per image is of: by whether a picture has several views.
WHOLE = {False: "a picture", True: "a picture, its thumbnail and crops together"}
LEGEND = (
    "",
    "stage: where tokens go; positions: default position ids after the cut (family: contiguous, but original",
    "where they lie on several axes, as M-RoPE's); syncs: device syncs per cut beyond",
    "one read of the placeholder counts; vLLM: whether it can be served. One in full: vlmprune ls methods NAME",
)


def verb(
    what: Annotated[Literal["methods", "models"], Argument(help="which list")],
    name: Annotated[str | None, Argument(help="only this method, in full")] = None,
    as_json: flags.Json = False,
) -> None:
    """List the methods (with those of other packages), or the models that can be pruned."""
    if name is not None and what != "methods":
        raise UserError(f"ls {what} takes no name.")
    if what == "methods":
        found = methods()
        if name is not None:
            found = [pick(found, name)]
        print(json.dumps(found, indent=2) if as_json else methods_text(found, full=name is not None))
    else:
        about = models()
        print(json.dumps(about, indent=2) if as_json else models_text(about))


def pick(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The method called `name`."""
    from vlmprune.errors import did_you_mean

    names = [method["name"] for method in found]
    if name not in names:
        raise UserError(f"unknown method {name!r}.{did_you_mean(name, names)} Known: {', '.join(names)}.")
    return found[names.index(name)]


def methods() -> list[dict[str, Any]]:
    """Every registered method; of one that cannot be loaded, the error."""
    from vlmprune import registry

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
    from vlmprune.parts.options import ranges

    options = {
        f.name: {"type": f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))}
        | ({} if f.default is MISSING else {"default": f.default})
        for f in fields(cls)
        if f.init
    }
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
    }


def served(cls: type) -> str:
    """Whether vLLM can be given a method: "yes", "with tau=None", "on llava, ..." or why not."""
    from vlmprune.serving.choice import SERVED, refusals

    why = refusals(cls)
    if len(why) == len(SERVED):
        return f"no: {why['llava_next']}"  # which has most of what methods ask for: crops, and a [CLS] token
    given = ", ".join(f"{key}={value}" for key, value in cls.served_with.items())
    if why:
        kept = ", ".join(name for name in SERVED if name not in why)
        return f"on {kept}{f' with {given}' if given else ''} (on others not: {next(iter(why.values()))})"
    return f"with {given}" if given else "yes"


def methods_text(found: list[dict[str, Any]], full: bool) -> str:
    """A paragraph per method, under headings that say what methods look at; of one in full, all that is known."""
    if full:
        return "\n".join(line for method in found for line in [*one_method(method), *details(method)])
    from vlmprune.methods.base import LOOKS_AT

    lines = []
    for group, heading in LOOKS_AT.items():
        mine = [method for method in found if heading_of(method) == group]
        lines += [f"{'' if not lines else chr(10)}{heading} ({len(mine)})"] if mine else []
        lines += [line for method in mine for line in one_method(method)]
    return "\n".join([*lines, *LEGEND])


def heading_of(method: dict[str, Any]) -> str:
    """The key in `LOOKS_AT` under which a method is listed: "" for what another package made up, or does not say."""
    from vlmprune.methods.base import LOOKS_AT

    group = method.get("looks_at", "")
    return group if group in LOOKS_AT else ""


def one_method(method: dict[str, Any]) -> list[str]:
    """A method in two lines."""
    ours = "" if method["from"] == "vlmprune" else f" [from {method['from']}]"
    if "error" in method:
        return [f"{method['name']}{ours}", f"    cannot be loaded: {method['error']}"]
    paper = f" ({method['paper']})" if method["paper"] else ""
    facts = "; ".join(f"{fact} {method[fact]}" for fact in FACTS)
    return [f"{method['name']}: {method['summary']}{paper}{ours}", f"    {facts}", f"    vLLM: {method['vllm']}"]


def details(method: dict[str, Any]) -> list[str]:
    """What is told of one method alone."""
    if "error" in method:
        return []
    given = [f"{o}={v['default']!r}" if "default" in v else o for o, v in method["options"].items()]
    searched = [f"{o} from {low:g} to {high:g}" for o, (low, high) in method["searched"].items()]
    more = [f"    `vlmprune tune --method {method['name']}` searches: {', '.join(searched)}"] if searched else []
    return [f"    options: {', '.join(given)}", *more, "", method["doc"]]


def models() -> dict[str, Any]:
    """Families, towers and language models that are supported, and the embedded models."""
    from vlmprune.eval import testbed
    from vlmprune.patches import FAMILIES, REFUSED
    from vlmprune.patches.language_models import LANGUAGE_MODELS
    from vlmprune.patches.towers import TOWERS

    return {
        "families": [
            {
                "model_type": kind,
                "title": family.title,
                "modalities": list(family.modalities),
                "usual_tower": family.usual_tower,
                "image": family.image or WHOLE[family.views],
                "refused_methods": refused(facts_of(family)),
                "refused_inputs": refused_inputs(family),
            }
            for kind, family in FAMILIES.items()
        ],
        "towers": [
            {
                "model_type": kind,
                "has_cls": has_cls,
                "refused_methods": refused(usual_facts("llava_next", True, has_cls)),
            }
            for kind, has_cls in TOWERS.items()
        ],
        "language_models": list(LANGUAGE_MODELS),
        "refused": dict(REFUSED),
        "embedded": [embedded(name) for name in testbed.EVERY],
    }


def embedded(name: str) -> dict[str, Any]:
    """An embedded model, or why it is not there."""
    from vlmprune.eval import testbed

    try:
        kind = json.loads((testbed.path(name) / "config.json").read_text())["model_type"]
    except FileNotFoundError as error:
        return {"name": name, "present": False, "why": brief(error)}
    return {"name": name, "family": kind, "present": True}


def loadable() -> Iterator[tuple[str, type[Method]]]:
    """The methods and their classes but for those that cannot be loaded, which `ls methods` reports."""
    from vlmprune import registry

    for name in registry.names():
        with suppress(Exception):  # another package's code
            yield name, registry.find(name)


def usual_facts(family: str, views: bool, has_cls: bool, **others: Any) -> ModelFacts:
    """Facts of a model of a common size."""
    from vlmprune.parts.facts import ModelFacts

    return ModelFacts(family, 24, 22, has_cls, decoder_layers=32, views=views, view_patches=576, **others)


def facts_of(family: Family) -> ModelFacts:
    """Facts of a family's usual model."""
    from vlmprune.patches.towers import TOWERS

    like = {"unit": family.usual_unit, "packed": family.packed, "closed": family.closed}
    return usual_facts(family.model_type, family.views, TOWERS[family.usual_tower], **like)


def refused(facts: ModelFacts) -> dict[str, str]:
    """Methods that do not run on such a model, by their own words."""
    from vlmprune import registry
    from vlmprune.engine.compile import compile_cuts
    from vlmprune.errors import UnsupportedError

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


def models_text(about: dict[str, Any]) -> str:
    """The same for a person."""
    lines = ["families (model_type: class)", *(line for family in about["families"] for line in one_family(family))]
    lines.append("vision towers")
    for tower in about["towers"]:
        lines.append(f"    {tower['model_type']}: {'with' if tower['has_cls'] else 'without'} a [CLS] token")
        lines += refusals(tower["refused_methods"])
    lines += ["language models", f"    {', '.join(about['language_models'])}"]
    lines += ["refused", *(f"    {kind}: {why}" for kind, why in about["refused"].items()), "embedded models"]
    for model in about["embedded"]:
        state = f"family {model['family']}" if model["present"] else f"missing: {model['why']}"
        lines.append(f"    {model['name']}: {state}")
    lines += ["", "Any folder or hub checkpoint of these families, towers and language models runs: --model PATH_OR_ID"]
    return "\n".join(lines)


def one_family(family: dict[str, Any]) -> list[str]:
    """A family with what does not run on it."""
    reads = " and ".join(f"{modality}s" for modality in family["modalities"])
    return [
        f"    {family['model_type']}: {family['title']}",
        f"        {reads}; usual tower {family['usual_tower']}",
        f"        an image of a budget is {family['image']}",
        *refusals(family["refused_methods"]),
        *(line for kind, methods in family["refused_inputs"].items() for line in refusals(methods, f" on {kind}")),
    ]


def refusals(methods: dict[str, str], on: str = "") -> list[str]:
    """A line per method that does not run."""
    return [f"        not {name}{on}: {why}" for name, why in methods.items()]
