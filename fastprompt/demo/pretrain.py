"""Trains the demo's small CLIP on rendered scenes: `python -m fastprompt.demo.pretrain`.

An ordinary CLIP (vision transformer with a class token, causal text transformer, symmetric contrastive loss) on the
pictures and captions of `fastprompt.demo.captions`. Three things differ from CLIP's own pretraining, so that minutes on
one CPU core are enough:

* The first steps show only a window of 4 x 4 of the 8 x 8 patches around the named object, later ones 6 x 6, the last
  ones the whole picture: a crop that keeps the position embeddings of the patches it shows.
* Half as much as on the image feature, the contrastive loss is also laid on the patch features (on the mean of the four
  patches most similar to a caption). CLIP's patches come to agree with text through its many pairs; those of five
  layers trained for minutes do not: without this term the patches alone classify at chance.
* Of the token embeddings only those in use are trained.

Disjoint from the demo's test data: pretraining never renders the 64 combinations of colour, texture and shape that are
the demo's classes, nor an unknown shape, colour or texture, and all its random generators have seeds of their own. The
script is deterministic for one version of torch and one processor, on one thread.
"""

import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear, normalize
from tqdm import trange

from fastprompt.backbone.demo_model import FOLDER, MEAN, STD, save_demo_clip
from fastprompt.demo.captions import all_words, caption
from fastprompt.demo.pretraining_pool import GRID, PRETRAINING_SEED, Pool, cut_patches, mirror, render_pool, windows
from fastprompt.demo.scenes import DEMO_CLASSES, IMAGE_SIZE, demo_scene, render

logger = logging.getLogger(__name__)

MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 16, "width": 128, "layers": 5, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}


@dataclass(frozen=True)
class Settings:
    """How the demo's CLIP is trained."""

    images: int = 24_000
    """Pictures in the pool."""
    steps: int = 2000
    batch: int = 128
    block_learning_rate: float = 2e-3
    """Of the matrices in the transformer blocks."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 50
    """Steps over which the learning rate rises; a cosine to zero follows."""
    patch_weight: float = 0.5
    """Of the contrastive loss on the patch features, beside that on the image feature."""
    best_patches: int = 4
    """How many patches, the most similar ones, stand for the picture in that loss."""
    window_sides: tuple[int, ...] = (4, 6, 8)
    window_ends: tuple[float, ...] = (0.7, 0.85, 1.0)
    """Up to which part of the steps each window side is used."""
    threads: int = 1
    out: Path = FOLDER


def encode_patches(model: CLIP, patches: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Features of uint8 patches (B, n, pixels) at the places `index` (B, n) of the grid, L2-normalised.

    Returns:
        Image features (B, D), with all patches those of `model.encode_image`; and patch features (B, n, D) by the value
        path of the last block (the token's own value, no attention), the ones that GalLoP compares with text.
    """
    mean, std = (torch.tensor(v).repeat(patches.shape[2] // 3) for v in (MEAN, STD))
    visual = model.visual
    x = (patches / 255 - mean) / std @ visual.conv1.weight.permute(2, 3, 1, 0).flatten(0, 2)
    x = x + visual.positional_embedding[1:][index]
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([first.to(x.dtype), x], 1))
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    pooled, x = last(x)[:, 0], x[:, 1:]
    attention, width = last.attn, x.shape[2]
    value = linear(last.ln_1(x), attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    x = x + attention.out_proj(value)
    x = x + last.mlp(last.ln_2(x))
    images, places = ((visual.ln_post(features) @ visual.proj).float() for features in (pooled, x))
    return normalize(images, dim=-1), normalize(places, dim=-1)


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Text features (B, D), L2-normalised; positions behind the last end of text are not computed."""
    ends = tokens.argmax(-1)
    length = int(ends.max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return normalize((x[torch.arange(len(x)), ends] @ model.text_projection).float(), dim=-1)


class Vocabulary:
    """The ordinary CLIP tokenizer, with the ids of the tokens in use numbered from 0 in their order."""

    def __init__(self) -> None:
        self._tokenizer = SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
        self.rows = torch.unique(self._tokenizer(all_words()))  # (V,) ids; the end of text stays the largest

    def __call__(self, texts: list[str]) -> Tensor:
        """Token numbers (B, context length)."""
        ids = self._tokenizer(texts)
        numbers = torch.searchsorted(self.rows, ids)
        if not torch.equal(self.rows[numbers.clamp(max=len(self.rows) - 1)], ids):
            raise ValueError("a caption has a word that fastprompt.demo.captions.all_words does not list")
        return numbers


def build(vocabulary: Vocabulary) -> CLIP:
    """A CLIP with random weights whose token embedding has only the vocabulary's rows."""
    model = CLIP(**MODEL)
    embedding = torch.nn.Embedding(len(vocabulary.rows), MODEL["text_cfg"]["width"])
    embedding.weight.data.copy_(model.token_embedding.weight.data[vocabulary.rows])
    model.token_embedding = embedding
    return model


def _schedule(step: int, settings: Settings) -> float:
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
    return min(1.0, (step + 1) / settings.warmup) * cosine


def _window_side(step: int, settings: Settings) -> int:
    part = step / settings.steps
    return next(s for s, end in zip(settings.window_sides, settings.window_ends, strict=True) if part < end)


def _optimizers(model: CLIP, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, where it needs fewer steps than AdamW; AdamW for the rest."""
    blocks = [p for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2]
    inside = {id(p) for p in blocks}
    others = [p for p in model.parameters() if id(p) not in inside]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(blocks, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)]


def _contrast(logits: Tensor) -> Tensor:
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def batch_loss(
    model: CLIP, vocabulary: Vocabulary, pool: Pool, side: int, settings: Settings, rng: np.random.Generator
) -> Tensor:
    """The loss on a random batch: fresh captions, windows of `side` patches, every other batch mirrored."""
    ids = rng.choice(len(pool.scenes), settings.batch, replace=False)
    index = windows(pool.centres[ids], side, rng)
    patches = pool.patches[torch.from_numpy(ids)[:, None], index]
    if rng.random() < 0.5:
        patches, index = mirror(patches, index)
    tokens = vocabulary([caption(pool.scenes[i], rng) for i in ids])
    # Plain attention: the fused CPU kernel takes twice as long backward on so few tokens.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        (images, places), texts = encode_patches(model, patches, index), encode_text(model, tokens)
        similarity = (places @ texts.T).float()  # (B, n, B)
    scale = model.logit_scale.exp()
    best = similarity.topk(settings.best_patches, dim=1).values.mean(1)
    return _contrast(scale * images @ texts.T) + settings.patch_weight * _contrast(scale * best)


def train(model: CLIP, vocabulary: Vocabulary, pool: Pool, settings: Settings) -> list[float]:
    """Trains the model in place; returns the loss of each step."""
    optimizers = _optimizers(model, settings)
    rates = (settings.block_learning_rate, settings.learning_rate)
    rng = np.random.default_rng((PRETRAINING_SEED, len(pool.scenes)))
    losses = []
    progress = trange(settings.steps, desc="pretraining", unit="step")
    for step in progress:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * _schedule(step, settings)
        loss = batch_loss(model, vocabulary, pool, _window_side(step, settings), settings, rng)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        losses.append(loss.item())
        if step % 20 == 0:
            progress.set_postfix(loss=f"{losses[-1]:.3f}", scale=f"{model.logit_scale.exp().item():.0f}")
    return losses


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, vocabulary: Vocabulary, repeats: int = 16) -> float:
    """Accuracy of "a photo of a {class}" on fresh pictures of the demo's classes, which pretraining never showed."""
    texts = encode_text(model, vocabulary([f"a photo of a {spec.name}" for spec in DEMO_CLASSES]))
    everything = torch.arange(GRID * GRID).expand(repeats, -1)
    correct = 0
    for label, spec in enumerate(DEMO_CLASSES):
        rngs = [np.random.default_rng((PRETRAINING_SEED, label, repeat)) for repeat in range(repeats)]
        pixels = np.stack([np.asarray(render(demo_scene(spec, "photo", rng), rng)[0]) for rng in rngs])
        images, _ = encode_patches(model, torch.from_numpy(cut_patches(pixels)), everything)
        correct += int(((images @ texts.T).argmax(1) == label).sum())
    return correct / (repeats * len(DEMO_CLASSES))


def main(settings: Settings) -> None:
    """Renders, trains, measures and saves."""
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    started = time.perf_counter()
    pool = render_pool(settings.images, settings.threads)
    rendered, cpu_started = time.perf_counter(), time.process_time()
    vocabulary = Vocabulary()
    model = build(vocabulary)
    train(model, vocabulary, pool, settings)
    trained, cpu_seconds = time.perf_counter(), time.process_time() - cpu_started
    accuracy = zero_shot_accuracy(model.eval(), vocabulary)
    facts = {
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "out"},
        "pretraining_combinations": len({s for scene in pool.scenes for s in scene.objects}),
        "pairs_seen": settings.steps * settings.batch,
        "seconds_rendering": round(rendered - started, 1),
        "seconds_training": round(trained - rendered, 1),
        "cpu_seconds_training": round(cpu_seconds, 1),
        "zero_shot_accuracy": round(accuracy, 4),
        "zero_shot_classes": len(DEMO_CLASSES),
    }
    save_demo_clip(settings.out, MODEL, model.state_dict(), vocabulary.rows, facts)
    logger.info("saved to %s: %s", settings.out, facts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(Settings))
