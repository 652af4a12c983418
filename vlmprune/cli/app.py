"""`vlmprune app`: a page in the browser where pictures are dropped and methods compared."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from vlmprune.cli import flags
from vlmprune.runtime.errors import UserError, extra

__all__ = ["verb"]

EXAMPLES = """\
examples:
  vlmprune app
  vlmprune app --model llava-hf/llava-1.5-7b-hf --device cuda --port 7861
"""


def verb(
    model: flags.Model = "scene-llava",
    host: Annotated[str, Option(metavar="ADDRESS", help="0.0.0.0 for everybody on the network")] = "127.0.0.1",
    port: Annotated[int, flags.number("where the page is")] = 7860,
    device: flags.Device = "auto",
    dtype: flags.DType = "auto",
) -> None:
    """Ask about a picture in the browser: kept tokens drawn on it, answers and times beside the unpruned model's."""
    extra("gradio", "the page is made with Gradio: pip install 'vlmprune[app]'")

    from vlmprune.eval import testbed
    from vlmprune.runtime import loading
    from vlmprune.runtime.app import Asker, page

    loaded = loading.open_model(model, device, dtype)
    shown = testbed.pictures() if loaded.source.embedded else []
    examples = [(str(one["file"]), one["question"]) for one in shown if one["model"] == loaded.source.name]
    made = page(Asker(loaded), examples)
    folders = sorted({file.rpartition("/")[0] for file, _ in examples})
    try:
        made.launch(server_name=host, server_port=port, allowed_paths=folders, show_error=True)
    except OSError as error:  # the port is taken
        raise UserError(f"cannot open {host}:{port}: {error}") from None
