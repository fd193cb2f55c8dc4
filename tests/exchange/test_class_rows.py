"""What a checkpoint of CoOp's family holds of its classes is compared with the names that are given."""

import pytest
import torch

from fastprompt.experiment.runs import load_run
from tests.exchange.conftest import save_dassl
from tests.exchange.test_import import NAMES, backbone, bring_in, buffers, images, names  # noqa: F401
from tests.learners.support import padded_text

CLEAN = tuple(name.replace("_", " ") for name in NAMES)


@pytest.fixture
def complaint(model_folder, names, common, tmp_path, capsys):  # noqa: F811
    """Import with other names than the checkpoint's own, and return the one sentence that refuses it."""

    def refuse(parameters, rows, given=NAMES):
        save_dassl(tmp_path / "c", parameters, rows)
        names.write_text("\n".join(given) + "\n")
        assert bring_in(tmp_path / "c", model_folder, "--class-names", names) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return error

    return refuse


@pytest.mark.parametrize("shape", [(4, 48), (4, 4, 48)])
def test_names_in_another_order_are_refused(shape, complaint, buffers, random):  # noqa: F811
    error = complaint({"ctx": torch.randn(shape, generator=random)}, buffers(), NAMES[::-1])
    assert "has 'dark blue' as class 0, but 'yellow' is named: expected its own classes in its own order" in error


@pytest.mark.parametrize("shape", [(4, 48), (3, 4, 48)])
def test_three_classes_under_four_names_are_refused(shape, complaint, buffers, random):  # noqa: F811
    error = complaint({"ctx": torch.randn(shape, generator=random)}, buffers(NAMES[:3]))
    assert "knows 3 classes, but 4 are named" in error


def test_one_wrong_name_is_refused(complaint, buffers, random):  # noqa: F811
    error = complaint({"ctx": torch.randn(4, 48, generator=random)}, buffers(), (*NAMES[:3], "yellow cat"))
    assert "has 'yellow' as class 3, but 'yellow cat' is named" in error


def test_contexts_that_fit_no_number_of_names_are_refused(complaint, buffers, random):  # noqa: F811
    error = complaint({"ctx": torch.randn(3, 4, 48, generator=random)}, buffers())
    assert "has 3 contexts, which do not fit its 4 embedded names" in error


@pytest.mark.parametrize("prompts", [2, 4])  # 4 are as many as there are classes
def test_plot_is_told_by_its_rows(prompts, buffers, model_folder, backbone, names, random, common, tmp_path):  # noqa: F811
    contexts = 0.3 * torch.randn(prompts, 4, 48, generator=random)
    save_dassl(tmp_path / "c", {"ctx": contexts}, buffers(repeat=prompts))
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names) == 0
    learner = load_run("run", backbone=backbone)
    assert (learner.method, learner.class_names) == ("plot", CLEAN)
    text = padded_text(backbone, contexts.half().float(), CLEAN)  # (N, C, D)
    torch.testing.assert_close(learner.text_features()[:-1], text, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 48), (4, 4, 48)])
def test_the_last_word_of_a_sentence_with_a_comma_counts(
    shape,
    buffers,  # noqa: F811
    model_folder,
    backbone,  # noqa: F811
    names,  # noqa: F811
    random,
    common,
    tmp_path,
):
    """ProGrad counts words and not tokens, so "X X X, a" has five tokens, of which four are learned."""
    context = 0.3 * torch.randn(shape, generator=random)
    save_dassl(tmp_path / "c", {"ctx": context}, buffers(context="X X X, a"))
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names) == 0
    learner, features = load_run("run", backbone=backbone), backbone.encode_images(images())
    last = backbone.embed_words("a").half().float().expand(*shape[:-2], 1, 48)
    whole = torch.cat([context.half().float(), last], dim=-2)
    text = padded_text(backbone, whole[None], CLEAN)[0]
    torch.testing.assert_close(learner(features).logits, backbone.logit_scale * features.pooled @ text.T)
