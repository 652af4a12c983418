"""Values of a config that torch and transformers give a meaning to, checked before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlmprune.errors import did_you_mean
from vlmprune.eval.config.tree import Key, Reader

__all__ = ["attention", "device", "device_map", "generation"]

#: What `device_map` takes besides a device.
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
#: Of the generation arguments: keys that lmms-eval's tasks have besides transformers' own, and keys that are taken.
TASKS_OWN = ("until", "max_gen_toks")
TAKEN = ("pad_token_id", "return_dict_in_generate", "transformers_version")
WHOLE = "max_new_tokens max_gen_toks min_new_tokens max_length min_length num_beams top_k no_repeat_ngram_size".split()
NUMBER = "temperature top_p min_p typical_p repetition_penalty length_penalty max_time".split()
SWITCH = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values")


def device(reader: Reader, key: Key, value: Any) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N`; whether this machine has it is another question."""
    good = isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value)
    return value if reader.check(key, value, bool(good), "auto, cpu, cuda or cuda:N") else "auto"


def device_map(reader: Reader, key: Key, value: Any) -> str | None:
    """One of the ways to spread a model, or a device."""
    good = isinstance(value, str) and (value in MAPS or re.fullmatch(r"cpu|cuda(:\d+)?", value))
    wanted = f"{', '.join(MAPS)}, cpu, cuda or cuda:N{hint(value, MAPS)}"
    return value if reader.check(key, value, bool(good), wanted) else None


def attention(reader: Reader, key: Key, value: Any) -> str | None:
    """A name that transformers knows; one with a slash is a kernel on the hub, which is found when it is loaded."""
    if not isinstance(value, str) or "/" in value:
        return reader.text(key, value) or None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]
    wanted = f"one of {', '.join(known)}, or a kernel owner/name on the hub{hint(value, known)}"
    return value if reader.check(key, value, value in known, wanted) else None


def generation(reader: Reader, key: Key, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`, and those that lmms-eval's tasks have besides: a misspelt one would mean nothing."""
    if not given:
        return {}
    from transformers import GenerationConfig

    known = [word for word in vars(GenerationConfig()) if word[0] != "_" and word not in TAKEN]
    known = [*TASKS_OWN, *sorted(known)]
    for word in given:
        at = (*key, word)
        if word in TAKEN:
            reader.wrong(at, f"{word} is given by vlmprune itself: leave it out.")
        elif word not in known:
            often = ", ".join((*TASKS_OWN, "max_new_tokens", "do_sample", "temperature", "num_beams"))
            way = f"It takes the arguments of transformers' generate, and those of lmms-eval's tasks: {often} ..."
            reader.wrong(at, f"unknown generation argument {word!r}.{did_you_mean(word, known)} {way}")
    return {word: argument(reader, (*key, word), word, value) for word, value in given.items()}


def argument(reader: Reader, key: Key, word: str, value: Any) -> Any:
    """One generation argument; its type is checked where it is plain what it must be. Null leaves it to the task."""
    if value is None:
        return None
    if word in WHOLE:
        return reader.whole(key, value, 0)
    if word in NUMBER:
        reader.number(key, value)
    elif word in SWITCH:
        reader.check(key, value, isinstance(value, bool), "true or false")
    elif word == "num_return_sequences":
        reader.check(key, value, value == 1, "1: several answers to a question are not supported")
    elif word == "until":
        reader.listed(key, value, lambda k, v: reader.check(k, v, isinstance(v, str), "text"), least=0)
    else:
        return reader.plain(key, value)
    return value


def hint(value: Any, known: Any) -> str:
    """A suggestion in brackets."""
    found = did_you_mean(value, known).strip() if isinstance(value, str) else ""
    return f" ({found})" if found else ""
