"""What fastprompt.layers takes the place of, written plainly, and a CLIP laid out like that of openai/CLIP."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """CLIP's activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """openai/CLIP's layout: the mask belongs to the block, sequences come first, no layer scale."""

    def __init__(self, width: int, heads: int, mask: Tensor) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """(L, C, W) to the same."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks one after the other."""

    def __init__(self, width: int, heads: int, layers: int, mask: Tensor) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(width, heads, mask) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """(L, C, W) to the same."""
        return self.resblocks(x)


class OpenAIClip(nn.Module):
    """The text half of openai/CLIP's CLIP: its attributes, with random weights."""

    def __init__(self, width: int = 48, heads: int = 4, layers: int = 3, embed_dim: int = 32) -> None:
        super().__init__()
        length, vocabulary = 77, 49408
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.transformer = Transformer(width, heads, layers, mask)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) / width**0.5)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_bias, std=0.1)
            nn.init.normal_(block.attn.out_proj.bias, std=0.1)


def text_encoder(model: nn.Module, prompts: Tensor, tokenized_prompts: Tensor) -> Tensor:
    """CoOp's TextEncoder.forward for a model of either layout: every row at its full length, unnormalised (C, D)."""
    x = prompts + model.positional_embedding
    if isinstance(model, OpenAIClip):
        x = model.transformer(x.transpose(0, 1)).transpose(0, 1)
    else:
        x = model.transformer(x, attn_mask=model.attn_mask)
    x = model.ln_final(x)
    return x[torch.arange(len(x)), tokenized_prompts.argmax(-1)] @ model.text_projection


def gallop_text(model: nn.Module, contexts: Tensor, tokenized_names: Tensor) -> Tensor:
    """GalLoP's encode_text: the name's tokens moved behind each context, (C, G, D), unnormalised."""
    embedded, own = model.token_embedding(tokenized_names), contexts.shape[1]
    per_prompt = []
    for context in contexts:
        rows = torch.cat([embedded[:, :1], context.expand(len(embedded), -1, -1), embedded[:, 1:-own]], dim=1)
        ids = F.pad(tokenized_names, (own, 0))[:, : rows.shape[1]]
        per_prompt.append(text_encoder(model, rows, ids))
    return torch.stack(per_prompt, dim=1)


def coop_prompts(
    model: nn.Module,
    context: Tensor,
    tokenized_prompts: Tensor,
    name_lengths: Sequence[int] = (),
    position: str = "end",
) -> Tensor:
    """CoOp's PromptLearner.forward: (C, 77, W) from a context (M, W), or (C, M, W) where classes have their own.

    The ids hold a placeholder for every token of the context between start of text and name. Position is that of the
    name: "end", "middle" or "front"; the last two need the number of tokens of every name.
    """
    classes, own = len(tokenized_prompts), context.shape[-2]
    embedded = model.token_embedding(tokenized_prompts).detach()
    start, behind = embedded[:, :1], embedded[:, 1 + own :]
    if context.dim() == 2:
        context = context.unsqueeze(0).expand(classes, -1, -1)
    if position == "end":
        return torch.cat([start, context, behind], dim=1)
    half = {"middle": own // 2, "front": 0}[position]
    rows = []
    for row, length in enumerate(name_lengths):
        name, rest = behind[row, :length], behind[row, length:]
        rows.append(torch.cat([start[row], context[row, :half], name, context[row, half:], rest]))
    return torch.stack(rows)


def dense_local_logits(
    features: Tensor, local_proj: Callable[[Tensor], Tensor], visual_proj: Tensor, text: Tensor
) -> Tensor:
    """GalLoP's local cosines (B, P, C, n) of features (B, P, W): both projections, the norm, the dense einsum."""
    projected = local_proj(features) @ visual_proj
    projected = projected / projected.norm(dim=-1, keepdim=True)
    return torch.einsum("bpd,knd->bpkn", projected, text)


def topk_reduce(dense: Tensor, topk: Sequence[int]) -> Tensor:
    """GalLoP's pooling of (B, P, C, n): the k best patches, one k a prompt or one for all."""
    best = dense.topk(min(max(topk), dense.shape[1]), dim=1).values
    if len(topk) == 1:
        return best.mean(dim=1)
    return torch.stack([best[:, :k, :, prompt].mean(dim=1) for prompt, k in enumerate(topk)], dim=-1)


def global_local_loss(
    global_logits: Tensor, dense: Tensor, targets: Tensor, scale: float, topk: Sequence[int], dropout: float
) -> Tensor:
    """GalLoP's loss on global (B, C, m) and dense local logits (B, P, C, n)."""
    local = topk_reduce(dense, topk)
    local_loss = torch.stack([F.cross_entropy(scale * local[..., j], targets) for j in range(local.shape[-1])]).mean()
    prompts = global_logits.shape[-1]
    drawn = torch.randint(prompts, (len(targets), 1, max(prompts - int(dropout * prompts), 1)))
    kept = torch.stack([image[:, index[0]].mean(dim=-1) for image, index in zip(global_logits, drawn, strict=True)])
    return local_loss + F.cross_entropy(scale * kept, targets)
