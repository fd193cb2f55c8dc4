"""GalLoP's loss, on local logits that are pooled already."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastprompt.errors import InputError
from fastprompt.learners.loss import drawn_cross_entropy, drawn_prompts, prompt_cross_entropy


class GlobalLocalLoss(nn.Module):
    """GalLoP's loss (arXiv 2407.01400) with the arguments of its published code.

    The cross-entropy of the mean of those global prompts that are drawn for an image, plus that of every local prompt,
    averaged over images and prompts. Prompts are drawn with replacement, by the same call of ``torch.randint`` as in
    the published code: with the same seed the loss is the same.

    Args:
        use_global_loss: whether global prompts count.
        use_local_loss: whether local prompts count.
        topk: patches of each local prompt, or one number for all. Only its length is used: ``TopKLocalHead`` has
            pooled the patches already.
        global_dropout_p: share of the global prompts left out per image. At 0 they are still drawn with replacement.
    """

    def __init__(
        self,
        use_global_loss: bool = True,
        use_local_loss: bool = True,
        topk: Sequence[int] = (5,),
        global_dropout_p: float = 0.75,
    ) -> None:
        super().__init__()
        self.use_global_loss, self.use_local_loss = use_global_loss, use_local_loss
        self.topk, self.global_dropout_p = tuple(topk), global_dropout_p

    def forward(
        self, global_logits: Tensor, local_logits: Tensor | None, targets: Tensor, logit_scale: Tensor | float
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            global_logits: (B, C, m) cosines.
            local_logits: (B, C, n) pooled cosines, or None.
            targets: (B,) labels.
            logit_scale: what cosines are multiplied by.

        Raises:
            InputError: local logits that are not pooled, or not as many as ``topk`` says.
        """
        loss = global_logits.new_zeros(())
        if self.use_local_loss and local_logits is not None:
            self._check(local_logits)
            loss = loss + prompt_cross_entropy(local_logits.transpose(1, 2), targets, logit_scale)
        if self.use_global_loss:
            images, _, prompts = global_logits.shape
            drawn = drawn_prompts(images, prompts, self.global_dropout_p, global_logits.device)
            loss = loss + drawn_cross_entropy(global_logits.transpose(1, 2), targets, logit_scale, drawn)
        return loss

    def _check(self, local_logits: Tensor) -> None:
        shape = tuple(local_logits.shape)
        if len(shape) != 3:
            raise InputError(f"local_logits: expected the pooled (B, C, n) of TopKLocalHead, got shape {shape}")
        if len(self.topk) not in (1, shape[-1]):
            raise InputError(f"topk: expected 1 or {shape[-1]} numbers for {shape[-1]} local prompts, got {self.topk}")
