"""The text tower of a CLIP as its parts, whoever wrote it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.backbone.blocks import Block, read_block
from fastprompt.backbone.memory import TowerSize
from fastprompt.errors import InputError
from fastprompt.sources.features import queue_copy


@dataclass(frozen=True, eq=False)
class TextModel:
    """A frozen reading of a text tower of open_clip or openai/CLIP; its tensors are those of the model.

    Attributes:
        token_embedding: of the vocabulary.
        positional_embedding: (L, W).
        blocks: in the layout of open_clip.
        final_norm: before the projection.
        projection: to the joint space; None where there is none.
        mask: (L, L), added to the scores of the attention; None where all tokens see each other.
        pool: which state of a sequence is read: "argmax" or "eos" for the end of text, "first" or "last".
    """

    token_embedding: nn.Embedding
    positional_embedding: Tensor
    blocks: tuple[Block, ...]
    final_norm: nn.Module
    projection: nn.Linear | Tensor | None
    mask: Tensor | None
    pool: str

    @classmethod
    def read(cls, model: nn.Module) -> TextModel:
        """Return the text tower of a CLIP, or the CLIP that is one.

        Raises:
            InputError: another tower, such as one of Hugging Face, or one with deep prompts.
        """
        tower = getattr(model, "text", model)
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
        if not blocks:
            raise InputError(f"model: expected the text transformer of a CLIP, got {type(tower).__name__} without one")
        if getattr(tower, "cls_emb", None) is not None:
            raise InputError("model: expected a text tower without an appended class embedding, got one of CoCa")
        if getattr(tower, "use_pad_mask", False):
            raise InputError("model: expected a text tower that does not mask its padding, got one that does")
        mask = getattr(blocks[0], "attn_mask", None)  # openai/CLIP
        return cls(
            token_embedding=tower.token_embedding,
            positional_embedding=tower.positional_embedding,
            blocks=tuple(map(read_block, blocks)),
            final_norm=tower.ln_final,
            projection=tower.text_projection,
            mask=getattr(tower, "attn_mask", None) if mask is None else mask,
            pool=getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", "argmax"),
        )

    @property
    def reads_end_of_text(self) -> bool:
        """Whether the features are those of the end-of-text token."""
        return self.pool in ("argmax", "eos")

    @property
    def causal(self) -> bool:
        """Whether nothing behind the end of text is read, so that prefixes can be shared and padding left out."""
        return self.mask is not None and self.reads_end_of_text

    @property
    def context_length(self) -> int:
        """L, the tokens that the tower reads."""
        return self.positional_embedding.shape[0]

    @property
    def width(self) -> int:
        """W, of token embeddings and contexts."""
        return self.positional_embedding.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the blocks, in which the tower computes."""
        return self.blocks[0].attn.in_proj_weight.dtype

    @property
    def size(self) -> TowerSize:
        """What decides how much memory a token takes."""
        return TowerSize(self.width, self.blocks[0].mlp.c_fc.out_features, len(self.blocks), self.dtype.itemsize)

    def embed(self, ids: Tensor) -> Tensor:
        """Return token embeddings (..., W) of token ids."""
        weight = self.token_embedding.weight
        return F.embedding(queue_copy(ids, weight.device), weight).to(self.dtype)

    def embed_one(self, token: int | None, groups: int) -> Tensor:
        """Return the embedding of a token (G, 1, W), or none (G, 0, W), without a copy from the host's memory."""
        token = slice(0, 0) if token is None else slice(token, token + 1)
        return self.token_embedding.weight[token].to(self.dtype).expand(groups, -1, -1)

    def positions(self, index: slice | Tensor) -> Tensor:
        """Return positional embeddings (..., W)."""
        return self.positional_embedding[index].to(self.dtype)

    def project(self, states: Tensor) -> Tensor:
        """Return text features (..., D), not normalised, of states (..., W) behind the last block."""
        x = self.final_norm(states).to(self.dtype)
        if self.projection is None:
            return x
        return self.projection(x) if isinstance(self.projection, nn.Linear) else x @ self.projection
