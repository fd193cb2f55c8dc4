"""Layers for existing code: they take the place of a layer of CoOp's or GalLoP's, with its inputs and its results.

``docs/drop_in.md`` shows the lines to change.
"""

from fastprompt.layers.local_head import TopKLocalHead
from fastprompt.layers.loss import GlobalLocalLoss
from fastprompt.layers.text_encoder import SharedPrefixTextEncoder

__all__ = ["GlobalLocalLoss", "SharedPrefixTextEncoder", "TopKLocalHead"]
