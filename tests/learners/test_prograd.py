"""ProGrad against a transcription of its equations."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastprompt import CoOp, InputError
from fastprompt.learners import ProGrad
from fastprompt.learners.recipe import find_recipe
from tests.learners import support
from tests.learners.support import NAMES

TEMPLATE = "a texture of {}."


def transcribed_gradient(wanted, known, weight):
    """The update rule for one tensor: what contradicts the known direction is taken away."""
    unit = known / known.norm()
    along = torch.dot(wanted.flatten(), unit.flatten())
    return wanted - weight * along * unit if along < 0 else wanted


def gradients(logits, teacher, labels, context):
    """Of the cross-entropy, and of the divergence from the teacher."""
    divergence = F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    (known,) = torch.autograd.grad(divergence, context, retain_graph=True)
    (wanted,) = torch.autograd.grad(F.cross_entropy(logits, labels), context, retain_graph=True)
    return wanted, known


@pytest.mark.parametrize("agree", [False, True])
def test_equals_its_equations_in_float32(agree, images):
    backbone = support.float32_backbone()
    features = backbone.encode_images(images)
    learner = support.moved(ProGrad(backbone, NAMES, zeros=2, template=TEMPLATE, weight=0.8))
    teacher = backbone.logit_scale * features.pooled @ support.template_text(backbone, TEMPLATE).T
    leaves = support.leaves_of(learner)
    context = leaves["context"]
    logits = backbone.logit_scale * features.pooled @ support.padded_text(backbone, context[None])[0].T
    for labels in map(torch.tensor, product(range(len(NAMES)), repeat=3)):
        wanted, known = gradients(logits, teacher, labels, context)
        if ((wanted * known).sum() > 0) == agree:
            break  # the first labels whose gradient does, or does not, agree with the teacher's
    context.grad = transcribed_gradient(wanted, known, 0.8)
    assert torch.equal(context.grad, wanted) == agree

    scores = learner(features)
    loss = learner.backward(scores, labels)
    support.assert_equal_to_1e_5(learner, (scores.logits, loss), (logits, F.cross_entropy(logits, labels)), leaves)
    if not agree:
        whole = ProGrad(backbone, NAMES, template=TEMPLATE)  # with the whole contradiction taken away
        whole.context = learner.context
        whole.context.grad = None
        whole.backward(whole(features), labels)
        assert F.cosine_similarity(whole.context.grad.flatten(), known.flatten(), dim=0).abs() < 1e-5


def test_gradients_of_several_batches_add_up_each_projected_on_its_own(vit_backbone, images):
    """Projecting the sum differs: the case is one in which some batch contradicts the teacher."""
    learner = support.moved(ProGrad(vit_backbone, NAMES))
    batches = [(vit_backbone.encode_images(images), torch.tensor(labels)) for labels in ([1, 0, 3], [4, 2, 1])]
    single = []
    for features, labels in batches:
        learner.context.grad = None
        learner.backward(learner(features), labels)
        single.append(learner.context.grad)
    learner.context.grad = None
    for features, labels in batches:
        learner.backward(learner(features), labels)
    torch.testing.assert_close(learner.context.grad, single[0] + single[1], rtol=1e-12, atol=0)
    plain = CoOp(vit_backbone, NAMES)
    plain.context = torch.nn.Parameter(learner.context.detach().clone())
    for features, labels in batches:
        plain.backward(plain(features), labels)
    assert not torch.allclose(learner.context.grad, plain.context.grad, rtol=1e-2)


def test_a_plain_backward_pass_of_the_loss_is_projected_too(vit_backbone, images):
    features, labels = vit_backbone.encode_images(images), torch.tensor([1, 0, 3])
    learner = support.moved(ProGrad(vit_backbone, NAMES))
    returned = learner.backward(learner(features), labels)
    projected, learner.context.grad = learner.context.grad, None
    loss = learner.loss(learner(features), labels)
    (2 * loss).backward()  # scaled, as for half precision
    torch.testing.assert_close(learner.context.grad, 2 * projected, rtol=1e-12, atol=0)
    assert torch.equal(loss, returned)


def test_with_weight_0_it_is_coop(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    support.assert_same_training(ProGrad(vit_backbone, NAMES, weight=0.0), CoOp(vit_backbone, NAMES), features)


def test_recipes_start_from_the_words_of_their_template():
    recipe = find_recipe(ProGrad, "dtd")
    assert recipe.options == {"context": "a texture of", "zeros": 13, "template": TEMPLATE, "weight": 0.8}
    assert find_recipe(ProGrad, "imagenet").epochs == 50


@pytest.mark.parametrize("dataset", ["default", "dtd", "oxford_pets"])
def test_the_context_of_a_recipe_is_zeros_and_words_as_published(dataset, vit_backbone):
    """The published start: "X" times what is missing to 16 words, in front of the sentence; X are zeros."""
    options = dict(find_recipe(ProGrad, dataset).options)
    learner = ProGrad(vit_backbone, NAMES, **options)
    words = options.get("context", "a photo of a")
    tokens = support.ids([" ".join(["X"] * (16 - len(words.split(" "))) + [words])])[0]
    assert len(learner.context) == tokens.argmax() - 1
    zeros = (tokens[1 : tokens.argmax()] == support.ids(["X"])[0, 1]).tolist()
    expected = vit_backbone.model.token_embedding(tokens[1 : tokens.argmax()]).detach()
    expected[zeros] = 0
    torch.testing.assert_close(learner.context.data, expected, check_dtype=False)
    assert ProGrad(vit_backbone, NAMES, **learner.options).context.shape == learner.context.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "weight: expected a finite number of at least 0, got -1"),
        ({"zeros": -1}, "zeros: expected 0 to 77 tokens, got -1"),
        ({"zeros": 70}, "is too long"),
    ],
)
def test_wrong_options_get_one_sentence(vit_backbone, options, message):
    with pytest.raises(InputError, match=message):
        ProGrad(vit_backbone, NAMES, **options)
