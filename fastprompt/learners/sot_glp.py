"""SOT-GLP: GalLoP with local prompts for every class, matched with its best patches by optimal transport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from fastprompt_kernels import selected_patches
from torch import Tensor, nn

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.learners.base import check_prompts
from fastprompt.learners.gallop import GalLoP
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.transport import Transport, transport_similarity

CODE = "SOT-GLP's code, train_script/scripts/run_*.sh: ViT-B/16, 16 shots; other numbers of shots are not published"


def _recipe(batch_size: int, lr: float, prompts: int, epochs: int = 200) -> Recipe:
    options = {"local_prompts": prompts}
    return Recipe(
        source=CODE, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=1e-2, warmup_epochs=0, options=options
    )


class SOTGLP(GalLoP):
    """SOT-GLP: GalLoP with class-specific local prompts and optimal transport for its patches (arXiv 2603.08347).

    For every image and class the patches with the largest cosine, averaged over the class's n local prompts, are kept,
    and PLOT's entropic transport (eps 0.1, at most 100 iterations, the same stopping rule) matches them with these
    prompts. As in the published code the cosines are weighted with the plan, summed over patches and **averaged** over
    prompts. The plan sums to 1, so a local score is 1/n of a weighted mean cosine: softer, and of less weight beside
    the global score, than a mean. Global prompts, projection, loss and prediction are GalLoP's.

    The paper replaces attention in its visual tower by a V-V stream for local features; here they are the value-path
    features of ``Backbone.encode_images``, which differ: an earlier comparison with its code, on random weights, found
    a cosine of 0.64. No option makes the paper's, as that code was not at hand to hold them against. OOD scores are
    GalLoP's, without the paper's temperature.

    Args:
        backbone: the frozen model.
        class_names: C names; the prompt is "<context> <name>", without a full stop.
        global_prompts: m, prompts that are compared with the whole image.
        local_prompts: n, prompts of each class that are compared with patches.
        patches: how many patches of an image are kept for each class; more than P means all.
        dropout: share of the global prompts left out per image in the loss, as in GalLoP.
        context: words that global prompts start from, or a number of tokens with random start. Local prompts have as
            many tokens and a random start (Xavier's uniform one over all of them).
    """

    method: ClassVar[str] = "sot-glp"
    independent_images: ClassVar[bool] = False
    telling: ClassVar[tuple[str, ...]] = ("local_prompts", "patches")
    class_specific = True
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": _recipe(32, 0.005, 4),
        "imagenet": _recipe(256, 0.01, 4, epochs=50),
        "caltech101": _recipe(32, 0.005, 6),
        "oxford_pets": _recipe(32, 0.005, 6),
        "flowers102": _recipe(32, 0.005, 6),
        "food101": _recipe(128, 0.005, 6),
        "fgvc_aircraft": _recipe(128, 0.01, 2),
        "sun397": _recipe(128, 0.005, 4),
        "dtd": _recipe(128, 0.002, 4),
        "eurosat": _recipe(10, 0.001, 4),
        "ucf101": _recipe(128, 0.005, 4),
    }

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        global_prompts: int = 3,
        local_prompts: int = 4,
        patches: int = 10,
        dropout: float = 0.75,
        context: int | str = "a photo of a",
    ) -> None:
        check_prompts("local_prompts", local_prompts)
        transport = Transport(keep=patches)
        super().__init__(
            backbone,
            class_names,
            global_prompts=global_prompts,
            k=[patches] * local_prompts,
            dropout=dropout,
            context=context,
        )
        self.transport = transport
        starts = torch.empty(len(self.class_names), *self.local_prompts.shape)
        starts = nn.init.xavier_uniform_(starts).transpose(0, 1).contiguous()
        self.local_prompts = nn.Parameter(starts.to(backbone.device))  # (n, C, M, W)

    def encode_text(self) -> Tensor:
        """See ``TextLearner``; G = m + n, global prompts first."""
        contexts = self.global_prompts, self.local_prompts
        return torch.cat([self.backbone.encode_prompts(context, self.class_tokens) for context in contexts])

    def _score_patches(self, features: ImageFeatures, prompts: Tensor) -> Tensor:
        """Local scores (B, 1, C): one for all prompts of a class."""
        return transport_similarity(self.local_features(features), prompts, self.transport)[:, None] / len(prompts)

    @torch.no_grad()
    def selected_patches(self, features: ImageFeatures, class_index: Tensor) -> Tensor:
        """Which patches take part in the transport, (B, 1, P) bool: the same for all prompts.

        Args:
            features: of B images.
            class_index: (B,).
        """
        features = self.backbone.accept(features)
        mean = self._split_text()[1].mean(dim=0, keepdim=True)
        per_image = [
            selected_patches(image[None], mean[:, index : index + 1], self.transport.keep)[0, :, 0]
            for image, index in zip(self.local_features(features), class_index.tolist(), strict=True)
        ]
        return torch.stack(per_image)

    def explain(self, features: ImageFeatures, class_index: Tensor) -> dict[str, Tensor]:
        """See ``Learner``: the patches that take part in the transport."""
        return {f"k = {self.transport.keep}": self.selected_patches(features, class_index)[:, 0]}
