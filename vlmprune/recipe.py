"""A recipe: one YAML file that carries a decision (methods, options, budget) wherever a model is run.

It is plain values, checked by a schema: no code is in it, and whatever is not understood is refused with its line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationInfo
from pydantic.dataclasses import dataclass

from vlmprune import spec
from vlmprune._version import __version__
from vlmprune.errors import UnsupportedError, did_you_mean
from vlmprune.yamls.kinds import Plain, Some, Text, kind
from vlmprune.yamls.told import ConfigSource, as_mistake
from vlmprune.yamls.tree import Key, Mistakes, read_text, read_tree

if TYPE_CHECKING:
    from vlmprune.methods.base import Method

__all__ = ["FILE", "Recipe", "is_recipe", "read_recipe", "recipe_of"]

FILE = "vlmprune.yaml"  # beside a model
ENDINGS = (".yaml", ".yml")
HEAD = "# A recipe of vlmprune: vlmprune.patch(model, FILE), or --recipe FILE.\n"


def budget(value: Any, info: ValidationInfo) -> Any:
    """One of `spec.BUDGETS`."""
    with as_mistake():
        return None if value is None else spec.read_budget(value, info.field_name or "")


def buildable(methods: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    """Known methods, each once."""
    with as_mistake():
        spec.takes("+".join(methods))
    return tuple(name for one in methods for name in spec.names_of(one))


Budget = Annotated[Any, AfterValidator(budget)]
#: Nothing stands for an empty one.
Facts = Annotated[dict[str, Plain], BeforeValidator(lambda value: {} if value is None else value)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """What a file says.

    Attributes:
        recipe: version of the format, 1.
        methods: names (`method` in the file: one, `a+b`, or a list); they run one after the other.
        keep, average: the budget; with several methods it goes to the one that takes it, or stands in `options`.
        options: the methods' options, `fopru.layer` where several have one.
        family: the `model_type` that it is for; None for any.
        model: what it was measured on.
        measured: what was measured, for readers.
        versions: of vlmprune and what it ran on.
        made: the day.
    """

    recipe: Annotated[Literal[1], kind("1, the only version of the format")]
    methods: Annotated[Some[Text], AfterValidator(buildable)] = Field(alias="method")
    keep: Budget = None
    average: Budget = None
    options: Facts = field(default_factory=dict)
    family: Text | None = None
    model: Text | None = None
    measured: Facts = field(default_factory=dict)
    versions: Facts = field(default_factory=dict)
    made: Text | None = None

    @property
    def method(self) -> str:
        """As `spec.build` takes it."""
        return "+".join(self.methods)

    @property
    def given(self) -> dict[str, Any]:
        """All options, the budget among them."""
        budgets = {word: getattr(self, word) for word in spec.BUDGETS if getattr(self, word) is not None}
        return budgets | {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}

    @property
    def job(self) -> spec.Job:
        """As the verbs take it."""
        return spec.Job(self.method, self.given, self.family)

    def build(self) -> list[Method]:
        """The method objects; raises as `spec.build`."""
        return spec.build(self.method, self.given)

    def text(self) -> str:
        """The file."""
        told = {word: self.method if word == "method" else getattr(self, word) for word in KEYS}
        said = {word: value for word, value in told.items() if value is not None and value != {}}
        return HEAD + yaml.safe_dump(plain(said), sort_keys=False, allow_unicode=True)

    def entry(self) -> dict[str, Any]:
        """As an entry of `methods` in the YAML of `vlmprune eval`."""
        if len(self.methods) == 1:
            own = {} if spec.budgets_in(self.given) or "keep" not in spec.takes(self.method) else {"own_budget": True}
            return plain({"name": self.method} | self.given | own)
        shares = spec.shares(self.methods, self.given)
        return {"name": [plain({"name": name} | options) for name, options in shares.items()]}


def plain(value: Any) -> Any:
    """As YAML has it: lists for tuples."""
    if isinstance(value, dict):
        return {word: plain(inner) for word, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def is_recipe(method: Any) -> bool:
    """Whether what stands in the place of a method is a recipe's file."""
    return isinstance(method, str | os.PathLike) and os.fspath(method).endswith(ENDINGS)


KEYS = tuple("method" if one.name == "methods" else one.name for one in fields(Recipe))
RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def unknown(loc: Key, key: Key) -> str:
    """What is known where a word is not."""
    return f"unknown key {key[-1]!r}.{did_you_mean(str(key[-1]), KEYS)} Known: {', '.join(KEYS)}."


def missing(loc: Key) -> str:
    """What a word that must be there is."""
    why = {"recipe": " (the version of the format: recipe: 1)", "method": " (`vlmprune ls methods`)"}
    return f"{loc[0]} is missing{why.get(str(loc[0]), '')}."


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read and check a recipe; its methods are built once, so that a mistake in an option is told here.

    Raises:
        Mistakes (a ValueError): everything that is wrong with it, with lines; no such file, or none that can be read.
    """
    path = Path(path).expanduser()
    tree = read_tree(read_text(path, lambda: "no such recipe."), str(path))
    source = ConfigSource(tree, unknown=unknown, missing=missing)
    if not isinstance(tree.value, dict):
        raise Mistakes([(str(path), "not a recipe: a mapping that begins with `recipe: 1` and names a `method`.")])
    found: list[tuple[str, str]] = []
    made = source.read(RECIPE, tree.value, found)
    if found:
        raise Mistakes(found)
    try:
        made.build()
    except (TypeError, ValueError, FileNotFoundError) as error:
        place = "options" if made.options else "method"
        raise Mistakes([(source.where(place), str(error))]) from None
    return made


def check_family(name: str, wanted: str | None, found: str) -> None:
    """Refuse a recipe on a model of another family than it was made for.

    Raises:
        UnsupportedError: it is.
    """
    if wanted is not None and wanted != found:
        raise UnsupportedError(
            f"{name} is for models of type {wanted!r}, and this one is of type {found!r}: make a recipe for this one, "
            "or take `family` out of the file if it is meant all the same."
        )


def recipe_of(methods: Sequence[Method], **facts: Any) -> Recipe:
    """The recipe of method objects; options that are the defaults are left out.

    Args:
        methods: as of `Handle.methods`.
        **facts: `family`, `model`, `measured`, `made`.

    Raises:
        ValueError: a method without a name, or an option that is no plain value (trained modules in memory).
    """
    shares = {method.name: options_of(method) for method in methods}
    if len(shares) < len(methods) or "" in shares:
        raise ValueError("a recipe names its methods: register each of them under a name of its own.")
    one = len(shares) == 1
    options = {k if one else f"{name}.{k}": v for name, mine in shares.items() for k, v in mine.items()}
    budgets = {word: options.pop(word) for word in spec.BUDGETS if word in options}
    versions = facts.pop("versions", {"vlmprune": __version__})
    return Recipe(recipe=1, method=list(shares), options=options, versions=versions, **budgets, **facts)


def options_of(method: Method) -> dict[str, Any]:
    """The options of a method object that are not the defaults.

    Raises:
        ValueError: one that is no plain value.
    """
    made = {}
    for one in (one for one in fields(method) if one.init):
        value = getattr(method, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if one.compare and value != default:
            if not isinstance(value, str | int | float | bool | tuple | Path | None):
                raise ValueError(f"{method.known_as}.{one.name} is no plain value, and a recipe has nothing else.")
            made[one.name] = str(value) if isinstance(value, Path) else value
    return made
