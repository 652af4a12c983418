"""A self-test of a method on the user's own model and machine: `vlmprune.check`, `vlmprune check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlmprune.api import patch, unwrap
from vlmprune.errors import UnsupportedError
from vlmprune.methods.base import Method
from vlmprune.patches import family_of
from vlmprune.verify import checks, evidence
from vlmprune.verify.about import about
from vlmprune.verify.prompts import check_placeholders, check_rotary, prompts_for
from vlmprune.verify.runs import run
from vlmprune.verify.taps import taps_line
from vlmprune.verify.verdict import CHECKS, OPEN, Line, Report

__all__ = ["CHECKS", "OPEN", "Line", "Report", "Subject", "check"]


class Subject:
    """A model to check methods on; what the plain model does is computed once.

    Args:
        model: unpatched, of a family of Hugging Face.

    Raises:
        UnsupportedError: a model of the original llava package, of no supported family, or not on one device.
        ValueError: a patched model, or one whose placeholders are no tokens of its vocabulary.
    """

    def __init__(self, model: nn.Module):
        self.model = unwrap(model)
        self.family = family_of(self.model)
        inner = self.family.inner(self.model)
        self.family.facts(inner)
        if not hasattr(inner, "get_image_features"):
            raise UnsupportedError(
                f"models of the original llava package ({self.family.model_type}) cannot be checked: check the "
                "Hugging Face conversion of the checkpoint (llava-hf/... on the hub)."
            )
        if len(devices := {p.device for p in self.model.parameters()}) > 1 or torch.device("meta") in devices:
            raise UnsupportedError(
                f"weights are offloaded or spread over several devices ({', '.join(sorted(map(str, devices)))}): the "
                "check runs parts of the model by hand, outside the calls that load and place them. Load the model on "
                "one device (in bfloat16 it takes half the room), or check a smaller one of its family."
            )
        if left := checks.left_behind(self.model):
            raise ValueError(f"this model is patched ({left[0]}): unpatch it first, then check it.")
        check_placeholders(self.family, self.model)
        self.plain: dict[bool, evidence.Plain] = {}

    def check(
        self,
        method: str | Method | Iterable[str | Method],
        *,
        step: Callable[[str], None] = lambda text: None,
        **options: Any,
    ) -> Report:
        """Check a method; arguments and errors as of `vlmprune.patch`.

        Args:
            step: called with words for what is going on.

        Raises:
            ValueError: also where the unpruned model computes NaN or infinite numbers.
            UnsupportedError: also where rotary embeddings change with the length of what was read.
        """
        with torch.no_grad(), evaluating(self.model):
            handle = patch(self.model, method, **options)
            names, methods = "+".join(m.name or type(m).__name__ for m in handle.methods), handle.methods
            in_tower, cuts = handle._plan.in_vision, [cut for _, cut in handle._plan.cuts]
            handle.unpatch()
            videos = "video" in self.family.modalities and not any(
                {"video", "shrunk"} & made.refuses_inputs.keys() for made in methods
            )
            plain = self.unpruned(videos, step)

            def waits() -> int | Exception | None:
                return evidence.attempt(lambda: checks.syncs(self.model, plain.prompts[0]))

            before = waits()
            step("pruned")
            with patch(self.model, methods) as handle:
                pruned = evidence.pruned_of(self.family, handle, plain)
                after = waits()
            left = checks.left_behind(self.model)
            again = evidence.attempt(
                lambda: run(self.family, self.model, plain.prompts[0], evidence.forced_tokens(plain.prompts[0]))
            )
            step("by hand")
            lines = self.compared(plain, pruned, in_tower)
            lines["restore"] = checks.restore_line(plain, again, pruned.run, left)
            step("taps")
            lines["taps"] = taps_line(self.family, self.model, cuts, plain.noise("rows").most)
            # beside the counts, what the sizes of pictures stand in is read
            reads = 1 + sum(name in plain.prompts[0] for name in self.family.shared)
            lines["syncs"] = checks.syncs_line(before, after, reads + sum(made.syncs for made in methods))
        return Report(names, list(map(repr, methods)), [lines[name] for name in CHECKS], about(self.model))

    def unpruned(self, videos: bool, step: Callable[[str], None]) -> evidence.Plain:
        """What the plain model does, with videos among the prompts or not."""
        if videos not in self.plain:
            step("the unpruned model")
            prompts = prompts_for(self.family, self.model, videos)
            check_rotary(self.family.language_model(self.family.inner(self.model)), prompts)
            self.plain[videos] = evidence.plain_of(self.family, self.model, prompts)
        return self.plain[videos]

    def compared(self, plain: evidence.Plain, pruned: evidence.Pruned, in_tower: bool) -> dict[str, Line]:
        """The lines that need a run by hand."""
        first = pruned.run
        if not isinstance(first, Exception):
            first = evidence.attempt(lambda: evidence.gathered(self.family, self.model, plain, pruned, in_tower))
        if isinstance(first, Exception):
            return {name: checks.raised(name, first) for name in checks.LINES}
        return {name: checks.judged(name, first) for name in checks.LINES}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every module has its own mode again (a frozen tower may be the only one in `eval`)."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def check(model: nn.Module, method: str | Method | Iterable[str | Method], **options: Any) -> Report:
    """Prove on this model and this machine that a method computes what it says.

    Random pictures and texts are run pruned and by hand; the model is left unpatched. Takes about twenty prefills and
    holds two caches of a few hundred tokens per picture.

    Args:
        model: an unpatched Hugging Face model (or a PEFT model around one).
        method: as of `vlmprune.patch`.
        **options: the same, `keep=` included.

    Returns:
        A report: `print(report)`; `report.passed`, `report.failed`, `report["cache"]`.

    Raises:
        UnsupportedError, ValueError, TypeError: as `patch`; also a model that is patched, of the original package,
            offloaded or on several devices, or that computes NaN or infinite numbers unpruned.
    """
    return Subject(model).check(method, **options)
