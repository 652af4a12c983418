"""`vlmprune run`: one prompt about pictures, with and without pruning."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from vlmprune.cli.flags import add_budget, add_device, add_model, budgets_of, options_of, words_of
from vlmprune.runtime.errors import UserError, user_mistakes
from vlmprune.runtime.prompts import check_text

__all__ = ["add_to"]

KEEP = "0.25"
EXAMPLES = """\
examples:
  vlmprune run --image scene.png --prompt "what colour is the circle ?"
  vlmprune run --image scene.png --prompt "which digit is in the picture ?" --keep 26 --save kept.png
  vlmprune run --image a.jpg b.jpg --prompt "What differs?" --model llava-hf/llava-v1.6-mistral-7b-hf \\
      --method fopru,vtc_cls,random --keep 0.25,0.1 --device cuda
  vlmprune run --image scene.png --prompt "is there a red square ?" --method fastv --option layer=3

The default model, scene-llava, comes with the package; it knows drawn scenes and 66 words. It understands, among
others: is there a red circle ? / what colour is the cross ? / what shape is the bottom right object ? / where is the
blue 3 ? / how many red objects are there ? / which digit is in the picture ? / what is left of the square ?
"""


def add_to(verbs: Any) -> None:
    """Add this verb's parser."""
    made = verbs.add_parser(
        "run",
        help="answer a prompt about pictures, with and without pruning",
        description="Answer a prompt about pictures with the full model and with pruned ones, and show what it costs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--image", nargs="+", action="extend", required=True, metavar="FILE", help="picture, or several")
    add("--prompt", required=True, help="what to ask; the model's chat template is put around it")
    add_model(made)
    add_budget(
        made,
        keep=f"patches per image (36), or a fraction of them (0.1 or 10%%), left in the end (default: {KEEP})",
        option="an option of the method (`vlmprune ls methods NAME`); may be repeated",
    )
    add("--save", metavar="FILE", help="draw the kept tokens over the picture and save that")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (default: %(default)s)")
    add(
        "--repeats", type=int, default=5, metavar="N", help="timed pairs of prefills, 0 for none (default: %(default)s)"
    )
    add_device(made)
    add("--json", action="store_true", help="print JSON")
    made.set_defaults(verb=run)


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked early, load the model, answer, print, draw."""
    from vlmprune.runtime.pictures import check_target, read_picture

    if args.max_new_tokens < 1 or args.repeats < 0:
        raise UserError("--max-new-tokens must be at least 1, and --repeats at least 0.")
    if not args.prompt.strip():
        raise UserError("--prompt is empty.")
    check_text(args.prompt, "--prompt")
    methods = words_of(args.method, "--method")
    budgets, named = budgets_of(args, KEEP)
    options = options_of(args.option)
    target = check_target(args.save) if args.save else None
    images = [read_picture(path) for path in args.image]

    # from here on it takes seconds: torch and transformers are imported
    from vlmprune import spec
    from vlmprune.cli.printing import Asked, as_json, as_text, save
    from vlmprune.runtime import answering, loading
    from vlmprune.runtime.status import note, status

    with user_mistakes():
        todo = spec.jobs(methods, budgets, options, named)
    device = loading.pick_device(args.device)
    loaded = loading.load(loading.find_model(args.model), device, args.dtype)
    answering.check(loaded, todo)
    inputs = loading.model_inputs(loaded, images, args.prompt)
    if loaded.source.embedded and (strange := loading.unknown_words(loaded, args.prompt)):
        note(f"{loaded.source.name} does not know these words: {', '.join(strange)}")
    loading.warn_of_photographs(loaded.source.name, loading.strange_pictures(loaded, images))
    status("full model: answering")
    plain = answering.answer(loaded, inputs, args.max_new_tokens)
    outcomes = [answering.run_job(loaded, job, inputs, args.max_new_tokens, args.repeats) for job in todo]

    asked = Asked(loaded, args.prompt, args.image, images, plain, outcomes)
    print(json.dumps(as_json(asked), indent=2) if args.json else as_text(asked))
    if target is not None:
        save(target, asked)
        print(f"kept tokens: {target}", file=sys.stderr if args.json else sys.stdout)
