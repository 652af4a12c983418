"""Flags that several verbs share."""

from __future__ import annotations

from argparse import ArgumentParser

__all__ = ["add_budget", "add_device", "add_model"]


def add_model(parser: ArgumentParser) -> None:
    """`--model` and `--method`."""
    parser.add_argument(
        "--model", default="scene-llava", metavar="NAME", help="embedded model, folder or hub id (default: %(default)s)"
    )
    parser.add_argument(
        "--method", default="fopru", metavar="NAME[,NAME]", help="methods (`vlmprune ls methods`; default: %(default)s)"
    )


def add_budget(parser: ArgumentParser, keep: str, option: str, metavar: str = "N[,N]") -> None:
    """`--keep` or `--average`, and `--option`; `keep` and `option` are their help."""
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--keep", metavar=metavar, help=keep)
    budget.add_argument("--average", metavar=metavar, help="the same as a mean over all decoder layers")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help=option)


def add_device(parser: ArgumentParser) -> None:
    """`--device` and `--dtype`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on a CPU, the checkpoint's own on a GPU (default: %(default)s)",
    )
