"""Learners against plain transcriptions of their equations, and the contract that all of them keep."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastprompt import CoOp, GalLoP, ImageFeatures, InputError, ZeroShot, load_backbone, make_learner
from fastprompt.learners import METHODS, find_method
from tests.learners import support
from tests.learners.support import LABELS, ids
from transcriptions.gallop import gallop_dense

NAMES = ("red fox", "polar bear", "cat", "very long name of a dog", "cat")
K = (1, 3, 7)


@pytest.fixture
def features(vit_backbone, images):
    return vit_backbone.encode_images(images)


@pytest.fixture
def gallop(vit_backbone):
    """A GalLoP away from its start, in float64, so that no symmetry hides a mistake."""
    return support.moved(GalLoP(vit_backbone, NAMES, global_prompts=3, k=K, dropout=0.5).double())


def dense_gallop(learner, features, drawn):
    """GalLoP from its equations: 77 tokens, dense similarity, leaf copies of the learned tensors."""
    leaves, visual = support.leaves_of(learner), learner.backbone.model.visual
    contexts = torch.cat([leaves["global_prompts"], leaves["local_prompts"]])
    text = support.padded_text(learner.backbone, contexts, NAMES, suffix="")
    local = F.normalize(features.patches @ leaves["local_projection"].T @ visual.proj, dim=-1)
    scale = learner.backbone.logit_scale
    return *gallop_dense(text, features.pooled, local, K, scale, LABELS, drawn), leaves


def test_gallop_equals_its_equations(gallop, features):
    drawn = torch.tensor([[2, 2], [0, 1], [1, 0]])
    scores = gallop(features)
    gallop.draw_prompts = lambda images, generator: drawn
    loss = gallop.loss(scores, LABELS)
    loss.backward()
    logits, expected, leaves = dense_gallop(gallop, features, drawn)
    expected.backward()
    torch.testing.assert_close(scores.logits, logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    for name, parameter in gallop.named_parameters():
        assert leaves[name].grad.abs().max() > 1e-4
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-8, atol=1e-9)


def test_gallop_in_float32_equals_its_equations_to_1e_5(vit_backbone, images):
    backbone = support.float32_backbone(vit_backbone)
    features, drawn = backbone.encode_images(images), torch.tensor([[2], [0], [1]])
    learner = support.moved(GalLoP(backbone, NAMES, global_prompts=3, k=K))
    scores = learner(features)
    learner.draw_prompts = lambda images, generator: drawn
    loss = learner.loss(scores, LABELS)
    loss.backward()
    logits, expected, leaves = dense_gallop(learner, features, drawn)
    expected.backward()
    support.assert_equal_to_1e_5(learner, (scores.logits, loss), (logits, expected), leaves)


def test_gallop_ood_scores_follow_gl_mcm(gallop, features):
    with torch.no_grad():
        text = gallop.encode_text()
        pooled = (features.pooled @ text[:3].mean(0).T).softmax(-1).amax(-1)
        patches = (gallop.local_features(features) @ text[3:].mean(0).T).softmax(-1).amax((1, 2))
    for kind, expected in (("mcm", -pooled), ("l-mcm", -patches), ("gl-mcm", -(pooled + patches))):
        torch.testing.assert_close(gallop.ood_score(features, kind), expected, rtol=0, atol=1e-6)
        with torch.inference_mode():
            torch.testing.assert_close(gallop.ood_score(features, kind), expected, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="kind: expected one of mcm, l-mcm, gl-mcm, got 'energy'"):
        gallop.ood_score(features, "energy")


def test_gallop_starts_as_the_identity_and_has_the_published_size():
    backbone = load_backbone("ViT-B-16", "random", device="cpu")
    learner = GalLoP(backbone, NAMES)
    assert sum(tensor.numel() for tensor in learner.state_dict().values()) == 606_208
    assert set(learner.state_dict()) == {"global_prompts", "local_prompts", "local_projection"}
    assert torch.equal(learner.local_projection, torch.eye(768))
    for prompt in (*learner.global_prompts, *learner.local_prompts):
        assert torch.equal(prompt, backbone.embed_words("a photo of a"))


def test_gallop_with_one_prompt_and_all_patches_is_a_mean_of_cosines(vit_backbone, features):
    learner = GalLoP(vit_backbone, NAMES, global_prompts=1, k=(999,))
    with torch.no_grad():
        patches = F.normalize(vit_backbone.project_patches(features.patches), dim=-1).mean(dim=1)
        text = learner.encode_text()
        expected = vit_backbone.logit_scale * (features.pooled @ text[0].T + patches @ text[1].T) / 2
        torch.testing.assert_close(learner(features).logits, expected, rtol=0, atol=1e-9)


def test_prompt_dropout_draws_with_replacement_and_keeps_the_published_number(vit_backbone):
    for prompts, dropout, kept in ((4, 0.75, 1), (5, 0.75, 2), (8, 0.75, 2), (4, 0.0, 4), (1, 1.0, 1)):
        learner = GalLoP(vit_backbone, NAMES, global_prompts=prompts, dropout=dropout)
        drawn = learner.draw_prompts(2000)
        assert drawn.shape == (2000, kept)
        assert set(drawn.unique().tolist()) == set(range(prompts))
    repeated = (drawn := GalLoP(vit_backbone, NAMES, dropout=0.0).draw_prompts(2000)).sort(dim=1).values
    assert (repeated[:, 1:] == repeated[:, :-1]).any(), "4 draws from 4 prompts without a repeat in 2000 images"
    assert drawn.float().mean() == pytest.approx(1.5, abs=0.1)


def test_selected_patches_are_the_k_most_similar(gallop, features):
    chosen = gallop.selected_patches(features, torch.tensor([0, 3, 2]))
    with torch.no_grad():
        text, local = gallop.encode_text()[3:], gallop.local_features(features)
    for image, index in enumerate((0, 3, 2)):
        for prompt, k in enumerate(K):
            best = (local[image] @ text[prompt, index]).topk(k).indices
            assert set(chosen[image, prompt].nonzero().flatten().tolist()) == set(best.tolist())
    maps = gallop.explain(features, torch.tensor([0, 3, 2]))
    assert list(maps) == ["prompt 1: k = 1", "prompt 2: k = 3", "prompt 3: k = 7"]
    assert torch.equal(torch.stack(list(maps.values()), dim=1), chosen)


def test_explain_says_by_how_much_a_patch_exceeds_the_mean(vit_backbone, features):
    classes = torch.tensor([0, 3, 2])
    for learner in (CoOp(vit_backbone, NAMES), make_learner("copl", vit_backbone, NAMES)):
        (found,) = learner.explain(features, classes).values()
        with torch.no_grad():
            for image, index in enumerate(classes):
                text = learner.mean_text(features)[1]
                of_class = text[index] if text.dim() == 2 else text[image, index]
                cosines = F.normalize(vit_backbone.project_patches(features.patches[image]), dim=-1) @ of_class
                torch.testing.assert_close(found[image], (cosines - cosines.mean()).relu(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains(vit_backbone, features, method):
    for found in make_learner(method, vit_backbone, NAMES).explain(features, LABELS).values():
        assert found.shape == features.patches.shape[:2]
        assert (found >= 0).all()
        assert found.any(dim=1).all()


@pytest.mark.parametrize("template", ["a photo of a {}, a type of pet.", "{} texture.", "a centered photo of {}."])
def test_zero_shot_equals_open_clip(vit_backbone, features, template):
    text = vit_backbone.model.encode_text(ids(template.format(name) for name in NAMES), normalize=True)
    logits = ZeroShot(vit_backbone, NAMES, template=template)(features).logits
    torch.testing.assert_close(logits, vit_backbone.logit_scale * features.pooled @ text.T, rtol=0, atol=1e-9)


def learned_by(loss):
    """All tensors that ``loss.backward()`` leaves a gradient on."""
    pending, seen, leaves = [loss.grad_fn], set(), set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves |= {node.variable} if hasattr(node, "variable") else set()
            pending += [before for before, _ in node.next_functions]
    return leaves


@pytest.mark.parametrize("method", METHODS)
def test_only_learned_tensors_are_stored_and_trained(vit_backbone, features, method):
    learner = make_learner(method, vit_backbone, NAMES)
    learner.prepare(SimpleNamespace(plain_batches=lambda reads: [(features, LABELS)]))
    assert set(learner.state_dict()) == {name for name, _ in learner.named_parameters()}
    if not learner.learns:
        assert not list(learner.parameters())
        assert not learner.loss(learner(features), LABELS).requires_grad
        return
    assert learned_by(learner.loss(learner(features), LABELS)) == set(learner.parameters())
    learner.backward(learner(features), LABELS)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learner.parameters())
    assert all(parameter.grad is None for parameter in vit_backbone.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_prediction_permutes_with_the_classes_and_sums_to_one(vit_backbone, features, method):
    learner = make_learner(method, vit_backbone, NAMES)
    probabilities = learner.predict(features)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3, dtype=probabilities.dtype))
    if learner.class_specific:
        return
    order = [3, 1, 4, 0, 2]
    permuted = learner.with_class_names([NAMES[index] for index in order]).predict(features)
    torch.testing.assert_close(permuted, probabilities[:, order], rtol=0, atol=1e-9)
    assert learner.class_names == NAMES


def test_other_class_names_share_the_learned_tensors(vit_backbone, features):
    learner = CoOp(vit_backbone, NAMES)
    other = learner.with_class_names(["dog", "cat"])
    before = other.predict(features)
    with torch.no_grad():
        learner.context.mul_(-3.0)
    assert other.context is learner.context
    assert not torch.allclose(other.predict(features), before), "a change of the context did not reach the other view"


def test_text_is_encoded_once_until_a_learned_tensor_changes(vit_backbone, features, monkeypatch):
    learner = GalLoP(vit_backbone, NAMES)
    calls = []
    encode = vit_backbone.encode_prompts
    monkeypatch.setattr(type(vit_backbone), "encode_prompts", lambda self, *a: calls.append(1) or encode(*a))
    learner.predict(features)
    learner.predict(features)
    assert len(calls) == 1
    with torch.no_grad():
        learner.local_prompts.mul_(0.5)
    changed = learner.predict(features)
    assert len(calls) == 2
    learner.load_state_dict(GalLoP(vit_backbone, NAMES).state_dict())
    assert not torch.equal(learner.predict(features), changed)


def test_prediction_in_inference_mode_does_not_spoil_training(vit_backbone, features):
    learner = GalLoP(vit_backbone, [*NAMES, "a name of a length of its own"])
    with torch.inference_mode():
        learner.predict(features)
    learner.loss(learner(features), LABELS).backward()
    assert learner.local_prompts.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: GalLoP(b, NAMES, k=(5, 0)), r"k: expected .* at least 1 per local prompt, got \(5, 0\)"),
        (lambda b: GalLoP(b, NAMES, k=()), r"k: expected .* got \(\)"),
        (lambda b: GalLoP(b, NAMES, global_prompts=0), "global_prompts: expected 1 to 10,000, got 0"),
        (lambda b: GalLoP(b, NAMES, dropout=2.0), "dropout: expected a share between 0 and 1, got 2.0"),
        (lambda b: CoOp(b, NAMES, context=0), "context: expected 1 to 77 tokens, got 0"),
        (lambda b: CoOp(b, NAMES, context=" "), "context: expected words or a number of tokens, got ' '"),
        (lambda b: ZeroShot(b, NAMES, template="a photo"), "template: expected a sentence with one {}"),
        (lambda b: make_learner("gallup", b, NAMES), "method: expected one of .*gallop, .*zero-shot, got 'gallup'"),
    ],
)
def test_wrong_options_get_one_sentence(vit_backbone, make, message):
    with pytest.raises(InputError, match=message):
        make(vit_backbone)


def test_learners_and_backbones_are_shown_in_one_short_line(vit_backbone):
    names = [f"class {number}" for number in range(64)]
    learned = 8 * 4 * 48 + 64 * 64
    shown = f"GalLoP(64 classes, test random, k=(5, 10, 15, 20), {learned:,} learned)"
    assert repr(GalLoP(vit_backbone, names)) == shown
    assert repr(CoOp(vit_backbone, names[:1], context=16)) == "CoOp(1 class, test random, context=16, 768 learned)"
    assert repr(ZeroShot(vit_backbone, names)) == "ZeroShot(64 classes, test random, 0 learned)"
    assert repr(vit_backbone) == "Backbone(test random, 4 x 4 patches, 32 wide, float64 on cpu)"
    for method in METHODS:
        assert len(repr(make_learner(method, vit_backbone, names))) < 120


def test_features_move_and_index_together():
    features = ImageFeatures(torch.arange(6.0).view(3, 2), torch.arange(12.0).view(3, 2, 2))
    assert len(features) == 3
    picked = features[torch.tensor([2, 0])].to("cpu")
    assert picked.pooled.tolist() == [[4, 5], [0, 1]]
    assert picked.patches[0].tolist() == [[8, 9], [10, 11]]


@pytest.mark.parametrize(
    ("spelling", "method"),
    [("CoOp", "coop"), ("GALLOP", "gallop"), ("SOTGLP", "sot-glp"), ("Sot_GLP", "sot-glp"), ("Zero Shot", "zero-shot")],
)
def test_methods_are_found_by_any_spelling(vit_backbone, spelling, method):
    assert find_method(spelling) is METHODS[method]
    assert make_learner(spelling, vit_backbone, NAMES).method == method


def test_every_method_is_found_by_the_name_of_its_class():
    for learner in METHODS.values():
        assert find_method(learner.__name__) is learner


def test_a_spelling_of_two_methods_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "co-op", METHODS["kgcoop"])
    assert find_method("co-op") is METHODS["kgcoop"], "an exact name is never ambiguous"
    with pytest.raises(InputError, match="got 'CO_OP': did you mean co-op or coop"):
        find_method("CO_OP")


@pytest.mark.parametrize("wrong", ["galop", "gallops", "GaLoPP"])
def test_the_nearest_method_is_suggested(wrong):
    with pytest.raises(InputError, match=f"got '{wrong}': did you mean gallop\\?"):
        find_method(wrong)
