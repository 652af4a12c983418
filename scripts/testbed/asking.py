"""Questions about a scene, with one right answer each, balanced so that a model without the picture stays low."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlmprune.eval.testbed.words import CATEGORIES, COLOUR_NAMES, DIGITS, PLACES, SHAPES, UNSEEN_PAIRS, VALUES

from .scenes import Scene, Thing

QuestionAnswer = tuple[str, str]
#: (offset of the place index, the half in which the asked thing must lie): left, right, above, below.
_DIRECTIONS = {"left of": (-1, 1), "right of": (1, 0), "above": (-2, 1), "below": (2, 0)}


def _pick(rng: np.random.Generator, items: list):
    """A uniformly random element, or None of an empty list."""
    return items[rng.integers(len(items))] if items else None


def _unique(things: list[Thing], attribute: str) -> list[Thing]:
    """The things whose colour (or value) no other thing has."""
    values = [getattr(t, attribute) for t in things]
    return [t for t in things if values.count(getattr(t, attribute)) == 1]


def ask_exist(rng: np.random.Generator, scene: Scene, unseen: bool = False) -> QuestionAnswer | None:
    """Is there a `colour value`? Half yes; most of the no share colour, value or both with things in the picture."""
    present = {t.pair for t in scene.things}
    thing = _pick(rng, scene.things)
    if unseen:
        thing = _pick(rng, [t for t in scene.things if t.pair in UNSEEN_PAIRS])
        return (f"is there a {thing.colour} {thing.value} ?", "yes") if thing else None
    if rng.random() < 0.5:
        return (f"is there a {thing.colour} {thing.value} ?", "yes")
    kind, other = rng.random(), _pick(rng, scene.things)
    for _ in range(20):
        colour, value = COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))], VALUES[rng.integers(len(VALUES))]
        if rng.random() < 0.6:
            value = SHAPES[rng.integers(len(SHAPES))]
        if kind < 0.35:
            colour, value = thing.colour, other.value
            other = _pick(rng, scene.things)
            kind = kind if len(scene.things) > 1 else 0.5
        elif kind < 0.6:
            colour = thing.colour
        elif kind < 0.85:
            value = thing.value
        if (colour, value) not in present and (colour, value) not in UNSEEN_PAIRS:
            return f"is there a {colour} {value} ?", "no"
    return None


def ask_colour(rng: np.random.Generator, scene: Scene, unseen: bool = False) -> QuestionAnswer | None:
    """The colour of what lies in a quadrant, or of the only thing with some value."""
    wanted = [t for t in scene.things if not unseen or t.pair in UNSEEN_PAIRS]
    if rng.random() < 0.5:
        thing = _pick(rng, wanted)
        return (f"what colour is the {scene.place(thing)} object ?", thing.colour) if thing else None
    thing = _pick(rng, [t for t in _unique(scene.things, "value") if t in wanted])
    return (f"what colour is the {thing.value} ?", thing.colour) if thing else None


def _ask_value(rng: np.random.Generator, scene: Scene, things: list[Thing], prefix: str) -> QuestionAnswer | None:
    """Value of one of `things`, named by its quadrant or by its colour where that is unique."""
    if rng.random() < 0.5:
        thing = _pick(rng, things)
        return (f"{prefix} is the {scene.place(thing)} object ?", thing.value) if thing else None
    thing = _pick(rng, [t for t in _unique(scene.things, "colour") if t in things])
    return (f"{prefix} is the {thing.colour} object ?", thing.value) if thing else None


def ask_shape(rng: np.random.Generator, scene: Scene, unseen: bool = False) -> QuestionAnswer | None:
    """The shape of what lies in a quadrant, or of the only thing of some colour."""
    things = [t for t in scene.things if t.value in SHAPES and (not unseen or t.pair in UNSEEN_PAIRS)]
    return _ask_value(rng, scene, things, "what shape")


def ask_digit(rng: np.random.Generator, scene: Scene, unseen: bool = False) -> QuestionAnswer | None:
    """Which digit lies in a quadrant, has some colour, or is the picture's only one."""
    if unseen:
        return None
    digits = [t for t in scene.things if t.value in DIGITS]
    if len(digits) == 1 and rng.random() < 0.4:
        return "which digit is in the picture ?", digits[0].value
    return _ask_value(rng, scene, digits, "which digit")


def ask_where(rng: np.random.Generator, scene: Scene, unseen: bool = False) -> QuestionAnswer | None:
    """The quadrant of a thing named by colour and value."""
    thing = _pick(rng, [t for t in scene.things if not unseen or t.pair in UNSEEN_PAIRS])
    return (f"where is the {thing.colour} {thing.value} ?", scene.place(thing)) if thing else None


def ask_count(rng: np.random.Generator, scene: Scene, unseen: bool = False) -> QuestionAnswer | None:
    """How many things, things of a colour, or things of a kind there are; each answer possible is equally likely."""
    if unseen:
        return None
    things = scene.things
    if rng.random() < 0.3:
        return "how many objects are there ?", str(len(things))
    options: dict[int, list[str]] = {}
    for colour in COLOUR_NAMES:
        options.setdefault(sum(t.colour == colour for t in things), []).append(f"{colour} objects")
    for shape in SHAPES:
        options.setdefault(sum(t.value == shape for t in things), []).append(f"{shape}s")
    options.setdefault(sum(t.value in DIGITS for t in things), []).append("digits")
    options.setdefault(sum(t.value in SHAPES for t in things), []).append("shapes")
    number = _pick(rng, sorted(options))
    return f"how many {_pick(rng, options[number])} are there ?", str(number)


def ask_relation(rng: np.random.Generator, scene: Scene, unseen: bool = False) -> QuestionAnswer | None:
    """What lies beside, above or below a thing: a value, or nothing where that whole half is empty."""
    at = scene.by_place()
    filled, empty = [], []
    for thing in scene.things:
        if unseen and thing.pair not in UNSEEN_PAIRS:
            continue
        place = PLACES.index(scene.place(thing))
        for direction, (offset, half) in _DIRECTIONS.items():
            if (place % 2 if abs(offset) == 1 else place // 2) != half:
                continue  # nothing can lie beyond the picture's edge: too easy a question
            question = f"what is {direction} the {thing.colour} {thing.value} ?"
            beside, diagonal = PLACES[place + offset], PLACES[3 - place]
            if beside in at:
                filled.append((question, at[beside].value))
            elif diagonal not in at:
                empty.append((question, "nothing"))
    if filled and (not empty or rng.random() < 0.85):
        return _pick(rng, filled)
    return _pick(rng, empty) if empty and rng.random() < 0.15 else None


ASK: dict[str, Callable[..., QuestionAnswer | None]] = {
    "exist": ask_exist,
    "colour": ask_colour,
    "shape": ask_shape,
    "where": ask_where,
    "count": ask_count,
    "digit": ask_digit,
    "relation": ask_relation,
}
assert tuple(ASK) == CATEGORIES


def caption(scene: Scene) -> str:
    """Place, colour and value of every thing, in reading order: `top left red circle . bottom right blue 3 .`"""
    at = scene.by_place()
    return " ".join(f"{place} {at[place].colour} {at[place].value} ." for place in PLACES if place in at)


def description(scene: Scene) -> str:
    """A long caption: how many things there are, then every quadrant, and what is right of and below what lies there.

    With three or four things it has 60 to 90 tokens, and names each thing once to three times.
    """
    at = scene.by_place()
    told = [f"there are {len(scene.things)} objects in the picture ."]
    for number, place in enumerate(PLACES):
        if place not in at:
            told.append(f"there is nothing in the {place} .")
            continue
        thing = f"{at[place].colour} {at[place].value}"
        told.append(f"the {place} object is a {thing} .")
        for direction, offset, inside in (("right of", 1, number % 2 == 0), ("below", 2, number < 2)):
            if inside:
                other = at.get(PLACES[number + offset])
                seen = f"a {other.colour} {other.value}" if other else "nothing"
                told.append(f"{direction} the {thing} there is {seen} .")
    return " ".join(told)


def training_questions(rng: np.random.Generator, scene: Scene, count: int, relations: int = 3) -> list[QuestionAnswer]:
    """Questions of every category that the scene allows; repetitions are rare.

    Those about relations come `relations` times as often as others: two hops are by far the slowest to learn.
    """
    turns = CATEGORIES + ("relation",) * (relations - 1)
    questions: list[QuestionAnswer] = []
    seen: set[str] = set()
    for attempt in range(count * 4):
        if len(questions) == count:
            break
        asked = ASK[turns[(attempt + int(rng.integers(2))) % len(turns)]](rng, scene)
        if asked is None or (asked[0] in seen and attempt < count * 3):
            continue
        seen.add(asked[0])
        questions.append(asked)
    while len(questions) < count:
        questions.append(ask_exist(rng, scene) or ask_where(rng, scene))
    return questions


def category_of(question: str) -> int:
    """Index in CATEGORIES of a question made by this module."""
    first, second = question.split()[:2]
    if first == "what" and second == "is":
        return CATEGORIES.index("relation")
    heads = {"is": "exist", "how": "count", "where": "where", "which": "digit"}
    return CATEGORIES.index(heads.get(first, second))
