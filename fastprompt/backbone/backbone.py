"""The frozen CLIP model that every learner stands on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.backbone.class_tokens import ClassTokens, tokenize_class_names
from fastprompt.backbone.image_towers import Patches, image_tower
from fastprompt.backbone.memory import MemoryBudget
from fastprompt.backbone.prompt_encoder import PromptEncoder
from fastprompt.backbone.text_model import TextModel
from fastprompt.backbone.tokenizer import Tokenizer
from fastprompt.errors import InputError
from fastprompt.sources.features import ImageFeatures


class Backbone(nn.Module):
    """A frozen open_clip model, in evaluation mode for good, read the way prompt learners need it.

    Made by ``load_backbone``. Its weights must not be changed, least of all through ``.data``, which nobody notices:
    constants of class names, frozen text and the fingerprint are kept as they were.

    Attributes:
        name: architecture name, as given.
        pretrained: tag or file of the weights, as given.
        patches: which patch features images have: "value", or for CLIP's ResNets "published", those of PLOT's code.
        fingerprint: hex digest of architecture and weights, followed by ``patches`` unless these are "value"; caches
            and checkpoints are keyed by it.
        image_size: side of the square input image in pixels.
        mean, std: normalisation of the three channels.
        interpolation, resize_mode: how an image is brought to ``image_size``.
        patch_grid: rows and columns of patches; P is their product.
        patch_width: W, width of patch features.
        embed_dim: D, width of the joint space.
        text_width: width of token embeddings and contexts.
        context_length: tokens that the text tower reads.
        logit_scale: the frozen temperature: cosines are multiplied by it.
        memory_budget: bytes that encoding prompts may take, forward and backward, beside the weights and the features
            themselves; "auto" for half of the memory that is free when a number of contexts, their length and a list
            of names are seen for the first time. What does not fit is encoded piece by piece, and for gradients each
            piece a second time: a third more work.
        cuda_graphs: whether a GPU replays passes through the text tower, those with gradients and in one piece, of the
            first two kinds that it meets. For trainings whose steps are alike: every pass has one backward pass. The
            memory of two passes stays taken, beside the budget. Elsewhere it changes nothing; its gain is not measured.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        name: str,
        pretrained: str | None,
        fingerprint: str,
        preprocessing: dict,
        patches: Patches = "value",
        memory_budget: MemoryBudget = "auto",
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__()
        size = preprocessing["size"]
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise InputError(f"backbone {name!r} takes images of {height}x{width}: only square images are supported")
        self.model = model.requires_grad_(False)
        super().train(False)
        self.tokenizer = tokenizer
        self.name, self.pretrained, self.patches = name, pretrained, patches
        self.fingerprint = fingerprint if patches == "value" else f"{fingerprint}-patches={patches}"
        self.image_size = height
        if memory_budget != "auto" and (not isinstance(memory_budget, int) or memory_budget < 1):
            raise InputError(f'memory_budget: expected a positive number of bytes or "auto", got {memory_budget!r}')
        self.memory_budget, self.cuda_graphs = memory_budget, cuda_graphs
        self.mean, self.std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
        self.interpolation = preprocessing["interpolation"]
        self.resize_mode = preprocessing["resize_mode"]
        self._images = image_tower(model.visual, height, patches)
        self._text = TextModel.read(model)
        self._prompts = PromptEncoder(self._text, tokenizer.start_of_text, tokenizer.padding)
        self.patch_grid, self.patch_width = self._images.patch_grid, self._images.patch_width
        self.text_width, self.context_length = self._text.width, self._text.context_length
        self.logit_scale = model.logit_scale.float().exp().item()
        with torch.no_grad():
            self.embed_dim = self.project_patches(torch.zeros(1, self.patch_width)).shape[-1]

    def __repr__(self) -> str:
        """Such as Backbone(ViT-B-16 openai, 14 x 14 patches, 512 wide, float32 on cpu)."""
        named, (rows, columns) = " ".join(filter(None, (self.name, self.pretrained))), self.patch_grid
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"Backbone({named}, {rows} x {columns} patches, {self.embed_dim} wide, {where})"

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode: batch statistics and dropout of a frozen tower never change."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the frozen weights."""
        return self._text.dtype

    @property
    def shares_prefix(self) -> bool:
        """Whether each context is encoded once for all classes (exact in causal text towers, impossible in others)."""
        return self._text.causal

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Pooled and patch features of preprocessed images (B, 3, S, S).

        Patch features are the value-path features of GalLoP (arXiv 2407.01400) for ViT and ResNet towers, or of
        ResNets the attention-pooled ones of PLOT (arXiv 2210.01253) where ``patches`` is "published", and the feature
        map of the trunk for timm towers. The features can be trained on wherever they were made, in a caller's
        inference mode, too.

        Raises:
            InputError: another shape, whole numbers, or, where the images are in the host's memory, NaN or infinite
                pixels; elsewhere looking for these would wait for the device.
        """
        self._check_images(images)
        with torch.inference_mode():
            pooled, patches = self._images.encode(images.to(self.device, self.dtype))
        # What is made outside can be saved for a backward pass: normalised, and copied.
        with torch.inference_mode(False):
            return ImageFeatures(F.normalize(at_least_float32(pooled), dim=-1), patches.clone(), self.fingerprint)

    def _check_images(self, images: Tensor) -> None:
        side = self.image_size
        expected = f"images: expected a tensor (B, 3, {side}, {side})"
        if not isinstance(images, Tensor):
            raise InputError(f"{expected}, got {type(images).__name__}")
        if images.shape[1:] != (3, side, side):
            raise InputError(f"{expected}, got shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputError(
                f"{expected} of floats, normalised with backbone.mean and backbone.std, got {images.dtype}: "
                "divide levels by 255 first"
            )
        if images.device.type == "cpu" and not torch.compiler.is_compiling() and not images.isfinite().all():
            raise InputError(f"{expected} of finite numbers, got NaN or infinity")

    def accept(self, features: ImageFeatures) -> ImageFeatures:
        """Image features on the backbone's device, which can be trained on.

        Args:
            features: of B images.

        Raises:
            InputError: something else, or features of another backbone.
        """
        if not isinstance(features, ImageFeatures):
            made = "ImageFeatures, as backbone.encode_images(images) makes them"
            raise InputError(f"features: expected {made}, got {type(features).__name__}")
        if features.fingerprint not in (None, self.fingerprint):
            raise InputError(
                f"features: expected those of {self.name!r} with fingerprint {self.fingerprint}, got those of another "
                f"backbone with {features.fingerprint}"
            )
        pooled, *patches = shapes = [tuple(tensor.shape) for tensor in features.tensors.values()]
        fits = len(pooled) == 2 and pooled[1] == self.embed_dim
        if not fits or any(len(one) != 3 or one[::2] != (pooled[0], self.patch_width) for one in patches):
            raise InputError(
                f"features: expected pooled (B, {self.embed_dim}) and patches (B, P, {self.patch_width}) of "
                f"{self.name!r}, got {' and '.join(map(str, shapes))}"
            )
        features = features.to(self.device)
        if torch.is_grad_enabled() and any(tensor.is_inference() for tensor in features.tensors.values()):
            features = features.change(Tensor.clone)
        return features

    def project_patches(self, patches: Tensor, learned: Tensor | None = None) -> Tensor:
        """Patch features (..., W) in the joint space (..., D), not normalised.

        Args:
            patches: (..., W).
            learned: weight (W, W) of a linear layer before the projection. Where the projection is a matrix, the two
                are multiplied first, in the higher of both precisions: the patches then take part in one product.
        """
        patches = patches.to(self.device, self.dtype)
        if learned is None:
            return self._images.project(patches)
        composed = self._images.compose(learned.to(torch.promote_types(learned.dtype, self.dtype)))
        if composed is None:
            return self._images.project(F.linear(patches, learned.to(self.dtype)))
        return patches @ composed.to(self.dtype)

    def tokenize(self, class_names: Sequence[str], suffix: str = "") -> ClassTokens:
        """Class names as packed tokens. CoOp's family appends ``suffix="."``; GalLoP appends nothing."""
        return tokenize_class_names(class_names, suffix, self.tokenizer.encode, self.tokenizer.end_of_text)

    def check_fits(self, context_tokens: int, class_tokens: ClassTokens) -> None:
        """Raise ``InputError`` that names the longest class if it does not fit behind that many context tokens."""
        self._prompts.check_fits(context_tokens, class_tokens)

    def embed_words(self, words: str) -> Tensor:
        """Token embeddings (M, W) in float32 of the M tokens of ``words``: the usual start of a learned context."""
        ids = torch.tensor(self.tokenizer.encode(words), dtype=torch.long)
        return at_least_float32(self._text.embed(ids)).clone()

    def encode_prompts(
        self, context: Tensor, class_tokens: ClassTokens, after: Tensor | None = None, *, normalise: bool = True
    ) -> Tensor:
        """Text features (G, C, D), L2-normalised, of every class behind every context.

        Gradients reach ``context`` through the frozen tower. In a causal tower the G prefixes are encoded once and
        the class names packed behind them: about G * (1 + M + T) tokens for T name tokens, instead of G * C * 77.

        Args:
            context: (G, M, W) contexts shared by all classes, or (G, C, M, W) contexts of their own.
            class_tokens: from ``tokenize``.
            after: context between name and suffix, in either shape with the same G, for prompts whose name stands in
                the middle or in front; it is encoded once a class.
            normalise: False leaves the features as long as the tower makes them, for methods that average them first.

        Raises:
            InputError: wrong shape, a class name that does not fit behind the context, or a budget too small for it.
        """
        self._check_context("context", context, class_tokens)
        if after is not None:
            self._check_context("after", after, class_tokens)
            if after.shape[-2] and not class_tokens.name_lengths:
                raise InputError("class_tokens: expected name_lengths, which say where the context goes, got none")
            after = after.to(self.device)
        if not len(context):  # of no image, where contexts are made of images
            return context.flatten(1).sum(dim=1)[:, None, None].expand(-1, len(class_tokens), self.embed_dim)
        with torch.autocast(self.device.type, enabled=False):  # the weights' precision is the tower's
            features = self._prompts.encode(
                context.to(self.device), class_tokens, self.memory_budget, after, self.cuda_graphs
            )
        text = at_least_float32(features)
        return F.normalize(text, dim=-1) if normalise else text

    def _check_context(self, name: str, context: Tensor, class_tokens: ClassTokens) -> None:
        shape = tuple(context.shape)
        class_specific = len(shape) == 4 and shape[1] == len(class_tokens)
        if shape[-1] != self.text_width or not (len(shape) == 3 or class_specific):
            raise InputError(
                f"{name}: expected shape (G, M, {self.text_width}) or (G, {len(class_tokens)}, M, {self.text_width}), "
                f"got {shape}"
            )


def at_least_float32(x: Tensor) -> Tensor:
    """Float32, or float64 where the tensor already is: norms and similarities are not taken in half precision."""
    return x if x.dtype == torch.float64 else x.float()
