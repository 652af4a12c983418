"""Kinds of values in a config, as pydantic checks them: those of every YAML file (`yamls.kinds`), and its own."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, create_model

from vlmprune import spec
from vlmprune.errors import did_you_mean
from vlmprune.yamls.kinds import AnyText, Many, Number, Plain, Some, Switch, Text, Whole, kind
from vlmprune.yamls.told import about, as_mistake, mistakes, must_be

#: What `device_map` takes besides a device.
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("auto", "float32", "bfloat16", "float16")
#: Whether this machine has the device is another question.
Device = Annotated[str, Strict(), Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$"), kind("auto, cpu, cuda or cuda:N")]
DeviceMap = Annotated[
    str,
    Strict(),
    Field(pattern=rf"^({'|'.join(MAPS)}|cpu|cuda(:[0-9]+)?)$"),
    kind(f"{', '.join(MAPS)}, cpu, cuda or cuda:N", MAPS),
]
DType = Annotated[Literal["auto", "float32", "bfloat16", "float16"], kind(f"one of {', '.join(DTYPES)}", DTYPES)]


# Seeds and budgets


def each_once(word: str) -> AfterValidator:
    """Numbers that differ; 1 (a token) and 1.0 (all of them) do. A seed that counts twice would narrow the spread."""

    def check(given: tuple[int | float, ...]) -> tuple[int | float, ...]:
        said = [repr(number) for number in given]
        if twice := dict.fromkeys(number for number in said if said.count(number) > 1):
            raise mistakes(((), f"{word} {', '.join(twice)} is given twice."))
        return given

    return AfterValidator(check)


Seeds = Annotated[Some[Whole], each_once("seed")]


def budgets(word: str) -> Any:
    """`keep` and `average`: one or several numbers, each once."""

    def read(value: Any) -> int | float:
        with as_mistake():
            return spec.read_budget(value, word)

    def given(value: Any) -> Any:
        if value is None:
            way = "leave it out for the budgets of all methods, or write own_budget: true for its own schedule."
            raise about(f"is null, which is no budget: {way}")
        return value

    return Annotated[Many[Annotated[Any, AfterValidator(read)]], each_once(word), BeforeValidator(given)]


Keep, Average = budgets("keep"), budgets("average")


# Values that methods and transformers give a meaning to


def attention(value: str) -> str:
    """A name that transformers knows; one with a slash is a kernel on the hub, which is found when it is loaded."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    if "/" not in value and value not in known:
        raise must_be(f"one of {', '.join(known)}, or a kernel owner/name on the hub", value, known)
    return value


def taken(value: Any) -> None:
    """Refuses a word that the user has no say in."""
    raise about("is given by vlmprune itself: leave it out.")


Taken = Annotated[Any, AfterValidator(taken)]
Attention = Annotated[Text, AfterValidator(attention)]

#: Of the generation arguments: keys that are taken, and keys that lmms-eval's tasks have besides transformers' own.
TAKEN = ("pad_token_id", "return_dict_in_generate", "transformers_version")
TASKS_OWN = ("until", "max_gen_toks")
WHOLE = "max_new_tokens max_gen_toks min_new_tokens max_length min_length num_beams top_k no_repeat_ngram_size".split()
NUMBER = "temperature top_p min_p typical_p repetition_penalty length_penalty max_time".split()
SWITCH = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values")
KINDS: dict[str, Any] = {
    **dict.fromkeys(WHOLE, Whole),
    **dict.fromkeys(NUMBER, Number),
    **dict.fromkeys(SWITCH, Switch),
    "num_return_sequences": Annotated[Literal[1], kind("1: several answers to a question are not supported")],
    "until": Many[AnyText],
}


@cache
def arguments() -> type[BaseModel]:
    """Arguments of `generate`, and those that lmms-eval's tasks have besides. Null leaves one to the task."""
    from transformers import GenerationConfig

    known = sorted(word for word in vars(GenerationConfig()) if word[0] != "_")
    fields: dict[str, Any] = {word: (KINDS.get(word, Plain) | None, None) for word in (*TASKS_OWN, *known)}
    fields |= dict.fromkeys(TAKEN, (Taken, None))
    return create_model("Arguments", __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)


def generation(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`, as they were given: a misspelt one would mean nothing."""
    if given:
        arguments().model_validate(given)
    return given


def unknown_argument(word: str) -> str:
    """What to say of a word that is no argument of `generate`."""
    often = ", ".join((*TASKS_OWN, "max_new_tokens", "do_sample", "temperature", "num_beams"))
    way = f"It takes the arguments of transformers' generate, and those of lmms-eval's tasks: {often} ..."
    known = [known for known in arguments().model_fields if known not in TAKEN]
    return f"unknown generation argument {word!r}.{did_you_mean(word, known)} {way}"


Generation = Annotated[dict[str, Any], AfterValidator(generation)]
