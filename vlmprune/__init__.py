"""Visual token pruning for LLaVA-style Hugging Face models, in one line.

import vlmprune

vlmprune.patch(model, "fopru", keep=64)
model.generate(**inputs)
vlmprune.unpatch(model)
"""

from vlmprune._compat import check_torchvision, check_transformers
from vlmprune._version import __version__

check_transformers()
check_torchvision()

from vlmprune.api import Handle, patch, unpatch  # noqa: E402  (the checks explain what these imports would hit)
from vlmprune.cuts import Cut, Decoder, Merge, Reduction  # noqa: E402
from vlmprune.errors import CutNotRunError, UnsupportedError  # noqa: E402
from vlmprune.layout import Layout  # noqa: E402
from vlmprune.methods import Method  # noqa: E402
from vlmprune.registry import register  # noqa: E402
from vlmprune.trace import Trace  # noqa: E402

__all__ = [
    "Cut",
    "CutNotRunError",
    "Decoder",
    "Handle",
    "Layout",
    "Merge",
    "Method",
    "Reduction",
    "Trace",
    "UnsupportedError",
    "__version__",
    "patch",
    "register",
    "unpatch",
]
