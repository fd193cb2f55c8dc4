"""The vocabulary's words that are nearest to what was learned."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.backbone import Backbone
from fastprompt.errors import InputError
from fastprompt.exchange.config import WordsConfig
from fastprompt.experiment.runs import load_run
from fastprompt.learners import Learner

WARNING = (
    "Nearest is not near: a learned token lies far from all words, and its neighbours rarely mean anything. "
    "Compare the distances with those between words."
)


def words_of_run(config: WordsConfig) -> str:
    """What ``nearest_words`` finds in a run, as text, with a warning not to read much into it."""
    learner = load_run(config.run, device=config.device)
    table = token_embeddings(learner.backbone)
    table = table[table.any(dim=-1)]
    typical = torch.cdist(table[-100:], table[:1000]).median().item()
    lines = [WARNING, f"Median distance between two words: {typical:.2f}"]
    for prompt, tokens in nearest_words(learner, config.top).items():
        lines.append(f"\n{prompt}")
        for number, found in enumerate(tokens, start=1):
            lines.append(f"  token {number}: " + ", ".join(f"{word} ({distance:.2f})" for word, distance in found))
    return "\n".join(lines)


def nearest_words(learner: Learner, top: int = 3) -> dict[str, list[list[tuple[str, float]]]]:
    """By learned prompt, for each of its tokens the nearest words of the vocabulary and their Euclidean distances.

    Prompts are named by the learned tensor and their place in it, such as "global_prompts 2". The words rarely mean
    anything.

    Args:
        learner: whose learned contexts are read.
        top: words for each token.

    Raises:
        InputError: nothing was learned that is a context, ``top`` is out of range, or a tokenizer without words.
    """
    backbone = learner.backbone
    table = token_embeddings(backbone)
    known = table.any(dim=-1).nonzero()[:, 0]  # a row of zeros was never trained
    if not 1 <= top <= len(known):
        raise InputError(f"top: expected 1 to {len(known)} words, got {top}")
    contexts = {
        name: learner.get_parameter(name).detach().float()[None].flatten(0, -3) for name in learner.contexts_named
    }
    if not contexts:
        raise InputError(f"{learner.method} has learned no context, so there are no words near it")
    found = {}
    for name, prompts in contexts.items():
        for number, tokens in enumerate(prompts.to(table.device), start=1):
            distances, places = torch.cdist(tokens, table[known]).topk(top, largest=False)
            words = [[backbone.tokenizer.decode([i]).strip() for i in row] for row in known[places].tolist()]
            found[f"{name} {number}"] = [
                list(zip(*row, strict=True)) for row in zip(words, distances.tolist(), strict=True)
            ]
    return found


@torch.no_grad()
def token_embeddings(backbone: Backbone) -> Tensor:
    """The text tower's table of token embeddings, (V, W), in float32."""
    tower = getattr(backbone.model, "text", backbone.model)
    return tower.token_embedding.weight.float()
