"""Frozen image towers: pooled features, and patch features before the joint projection, from one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from fastprompt.backbone.blocks import close_block, project, split_heads
from fastprompt.errors import InputError

Patches = Literal["value", "published"]


class ImageTower(ABC):
    """What a backbone needs of an image tower.

    Attributes:
        patch_grid: rows and columns of patches.
        patch_width: W, the width of a patch feature before the joint projection.
    """

    patch_grid: tuple[int, int]
    patch_width: int

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, D), not normalised, and patch features (B, P, W) of images (B, 3, S, S)."""

    @abstractmethod
    def project(self, patches: Tensor) -> Tensor:
        """Patch features (..., W) in the joint space (..., D), not normalised."""

    @abstractmethod
    def compose(self, learned: Tensor) -> Tensor | None:
        """The matrix (W, D) that applies a linear layer's weight (W, W) and then ``project``; None where none does."""


def image_tower(visual: nn.Module, image_size: int, patches: Patches = "value") -> ImageTower:
    """The reader that fits an open_clip image tower.

    Args:
        visual: the tower.
        image_size: side of its images in pixels.
        patches: which patch features it gives; see ``Backbone``.

    Raises:
        InputError: a tower that we cannot read, or one without such patch features.
    """
    if isinstance(visual, ModifiedResNet):
        return ResNetTower(visual, image_size, patches)
    if not isinstance(visual, VisionTransformer | TimmModel):
        raise InputError(
            f"image tower {type(visual).__name__} is not supported: expected a ViT, a ModifiedResNet or a timm trunk"
        )
    if patches == "published":
        raise InputError(
            "patches: expected 'value' for all but CLIP's ResNets, got 'published': GalLoP's published features of a "
            "ViT are those of the value path, and none are published for timm trunks"
        )
    if isinstance(visual, VisionTransformer):
        return VisionTransformerTower(visual)
    return TimmTower(visual, image_size)


class VisionTransformerTower(ImageTower):
    """A ViT with a class token. Patch features follow the value path of the last block, as in GalLoP.

    In the last block only the class token attends; a patch takes its own value instead of a mixture of values. Both
    go through the same output projection and MLP, so the block costs less than an ordinary one.
    """

    def __init__(self, visual: VisionTransformer) -> None:
        blocks = visual.transformer.resblocks
        if visual.attn_pool is not None or visual.pool_type != "tok":
            raise InputError("a ViT without class-token pooling is not supported: its patch features are not defined")
        if any(type(block) is not ResidualAttentionBlock for block in blocks):
            raise InputError(f"ViT blocks of type {type(blocks[-1]).__name__} are not supported")
        self.visual = visual
        self.patch_grid = visual.grid_size
        self.patch_width = visual.positional_embedding.shape[1]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ImageTower``."""
        visual = self.visual
        x = self._embed(images)
        for block in visual.transformer.resblocks[:-1]:
            q, k, v = split_heads(block, x).permute(2, 0, 3, 1, 4)  # each (B, heads, 1 + P, d)
            x = close_block(block, x, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = visual.ln_post(_value_path_block(visual.transformer.resblocks[-1], x))
        return x[:, 0] @ visual.proj, x[:, 1:]

    def _embed(self, images: Tensor) -> Tensor:
        """Tokens (B, 1 + P, W). The patches do not overlap, so their convolution is one matrix product."""
        visual, (rows, columns) = self.visual, self.patch_grid
        weight = visual.conv1.weight  # (W, 3, height, width) of a patch
        height, width = weight.shape[2:]
        images = images[..., : rows * height, : columns * width]  # a convolution leaves a remainder out, too
        cut = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))
        pixels = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, P, 3 * height * width)
        patches = F.linear(pixels, weight.flatten(1))
        x = torch.cat([visual.class_embedding.expand(images.shape[0], 1, -1), patches], dim=1)
        return visual.ln_pre(x + visual.positional_embedding)

    def project(self, patches: Tensor) -> Tensor:
        """See ``ImageTower``."""
        return patches @ self.visual.proj

    def compose(self, learned: Tensor) -> Tensor | None:
        """See ``ImageTower``."""
        return learned.T @ self.visual.proj.to(learned.dtype)


def _value_path_block(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """One block in which token 0 attends to all tokens and every other token keeps its own value."""
    heads = (block.attn.num_heads, -1)
    q = project(block, x[:, :1], "q").unflatten(-1, heads).transpose(1, 2)  # (B, heads, 1, d)
    k, v = project(block, x, "kv").unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)  # each (B, heads, 1 + P, d)
    attended = F.scaled_dot_product_attention(q, k, v)
    mixed = torch.cat([attended, v[:, :, 1:]], dim=2).transpose(1, 2).flatten(2)
    return close_block(block, x, mixed)


class ResNetTower(ImageTower):
    """CLIP's ModifiedResNet, whose patch features are in the joint space already.

    "value": the value projection of a patch's cell. "published": what attention pooling makes of the cell when it asks
    as the pooled token does, with its position, as in PLOT's code.
    """

    def __init__(self, visual: ModifiedResNet, image_size: int, patches: Patches) -> None:
        # Measured on a CPU with AMX: 1.3 times faster in float32, and 3.0 times in bfloat16.
        self.visual = visual.to(memory_format=torch.channels_last)
        self.patch_grid = (image_size // 32, image_size // 32)
        self.patch_width = visual.output_dim
        self.cells_ask = patches == "published"

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ImageTower``."""
        visual, pool = self.visual, self.visual.attnpool
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
        cells = x.flatten(2).transpose(1, 2)  # (B, P, W)
        position = pool.positional_embedding.to(x.dtype)
        tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1) + position
        values = pool.v_proj(cells)  # without position; that of the pooled token and of the positions is added
        v = torch.cat([values.mean(dim=1, keepdim=True), values], dim=1) + F.linear(position, pool.v_proj.weight)

        def heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)

        q, k = heads(pool.q_proj(tokens if self.cells_ask else tokens[:, :1])), heads(pool.k_proj(tokens))
        attended = pool.c_proj(F.scaled_dot_product_attention(q, k, heads(v)).transpose(1, 2).flatten(2))
        return attended[:, 0], attended[:, 1:] if self.cells_ask else pool.c_proj(values)

    def project(self, patches: Tensor) -> Tensor:
        """See ``ImageTower``."""
        return patches

    def compose(self, learned: Tensor) -> Tensor | None:
        """See ``ImageTower``."""
        return learned.T


class TimmTower(ImageTower):
    """A timm trunk with open_clip's head. Patch features are the trunk's feature map.

    A patch is projected as an image that consists of this patch alone, so whatever stands between the map and the
    joint space (norm, pooling, linear head) is applied once, exactly as for a whole image.
    """

    def __init__(self, visual: TimmModel, image_size: int) -> None:
        if hasattr(visual.head, "pool"):
            raise InputError("timm towers with a positional attention pool in open_clip's head are not supported")
        self.visual = visual
        self.prefix_tokens = getattr(visual.trunk, "num_prefix_tokens", 0)
        self.channels_last = getattr(visual.trunk, "output_fmt", "NCHW") == "NHWC"
        weight = next(visual.trunk.parameters())
        with torch.no_grad():
            blank = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
            features = visual.trunk.forward_features(blank)
        self.is_map = features.dim() == 4
        self.patch_grid = self._grid(features)
        patches = self._patches(features)
        self.patch_width = patches.shape[-1]
        with torch.no_grad():
            alone = self.project(patches[:, :1])
        if not alone.is_meta and not alone.isfinite().all():
            raise InputError("timm towers whose pooling drops their prefix tokens are not supported")

    def _grid(self, features: Tensor) -> tuple[int, int]:
        if not self.is_map:
            return tuple(self.visual.trunk.patch_embed.grid_size)
        return tuple(features.shape[1:3] if self.channels_last else features.shape[2:4])

    def _patches(self, features: Tensor) -> Tensor:
        if not self.is_map:
            return features[:, self.prefix_tokens :]
        return features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ImageTower``."""
        features = self.visual.trunk.forward_features(images)
        return self.visual.head(self.visual.trunk.forward_head(features)), self._patches(features)

    def project(self, patches: Tensor) -> Tensor:
        """See ``ImageTower``."""
        alone = patches.reshape(-1, 1, self.patch_width)  # every patch as an image of one patch
        if self.is_map:
            alone = alone[:, None] if self.channels_last else alone.transpose(1, 2)[..., None]
        return self.visual.head(self.visual.trunk.forward_head(alone)).unflatten(0, patches.shape[:-1])

    def compose(self, learned: Tensor) -> Tensor | None:
        """See ``ImageTower``: a norm stands before the head of most trunks."""
        return None
