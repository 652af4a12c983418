"""`vlmprune ls`: the methods and models there are."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from typer import Argument

from vlmprune.cli import flags
from vlmprune.runtime.errors import UserError

__all__ = ["verb"]

EXAMPLES = """\
examples:
  vlmprune ls methods
  vlmprune ls methods fopru      one method with all its options
  vlmprune ls models --json
"""
FACTS = ("needs", "stage", "positions", "syncs", "training")
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
    from vlmprune.eval import catalogue

    if what == "models":
        found, text = catalogue.models(), models_text
    elif name is None:
        found, text = catalogue.methods(), methods_text
    else:
        found, text = [pick(catalogue.methods(), name)], in_full
    print(json.dumps(found, indent=2) if as_json else text(found))


def pick(found: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The method called `name`."""
    from vlmprune.errors import did_you_mean

    names = [method["name"] for method in found]
    if name not in names:
        raise UserError(f"unknown method {name!r}.{did_you_mean(name, names)} Known: {', '.join(names)}.")
    return found[names.index(name)]


def in_full(found: list[dict[str, Any]]) -> str:
    """All that is known of methods."""
    return "\n".join(line for method in found for line in [*one_method(method), *details(method)])


def methods_text(found: list[dict[str, Any]]) -> str:
    """A paragraph per method, under headings that say what methods look at."""
    from vlmprune.methods.base import LOOKS_AT

    groups: dict[str, list[str]] = {group: [] for group in LOOKS_AT}
    for method in found:
        group = method.get("looks_at")  # another package may have made one up, or say nothing
        groups[group if group in groups else ""].append("\n".join(one_method(method)))
    parts = ["\n".join([f"{LOOKS_AT[group]} ({len(mine)})", *mine]) for group, mine in groups.items() if mine]
    return "\n".join(["\n\n".join(parts), *LEGEND])


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
    lines = [f"    options: {', '.join(given)}"]
    if searched := [f"{o} from {low:g} to {high:g}" for o, (low, high) in method["searched"].items()]:
        lines.append(f"    `vlmprune tune --method {method['name']}` searches: {', '.join(searched)}")
    everywhere = ["", "As everywhere:", method["shared"]] if method["shared"] else []
    return [*lines, "", method["doc"], *everywhere]


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
