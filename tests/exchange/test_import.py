"""Checkpoints of other code become runs that compute what they computed; none is executed."""

import argparse
import logging
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import MultiStepLR, StepLR

from fastprompt import CoOp, InputError, load_backbone
from fastprompt.cli import main
from fastprompt.exchange.checkpoint import read_checkpoint
from fastprompt.exchange.config import ImportConfig
from fastprompt.exchange.import_run import import_run
from fastprompt.experiment.runs import load_run
from tests.exchange.conftest import SGD, save_dassl, save_gallop
from tests.learners.support import padded_text

NAMES = ("dark_blue", "green", "red", "yellow")


@pytest.fixture
def backbone(model_folder):
    return load_backbone(f"local-dir:{model_folder}", device="cpu")


@pytest.fixture
def names(tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path / "classes.txt"


@pytest.fixture
def start(backbone):
    return backbone.model.token_embedding.weight[49406].detach().half()


@pytest.fixture
def buffers(backbone):
    """Those of a prompt learner of CoOp: embedded prompts without the context, which is "X" so many times."""

    def made(names=NAMES, context="X X X X", learned=4, repeat=1):
        prompts = [f"{context} {name.replace('_', ' ')}." for name in names] * repeat
        embedded = backbone.model.token_embedding(SimpleTokenizer()(prompts, context_length=77)).detach().half()
        return {"token_prefix": embedded[:, :1], "token_suffix": embedded[:, 1 + learned :]}

    return made


def bring_in(file, model_folder, *more):
    return main(["import", str(file), "--backbone", f"local-dir:{model_folder}", "--out", "run", *map(str, more)])


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["coop", "kgcoop"])
def test_coop_and_kgcoop(method, backbone, model_folder, names, buffers, random, common, tmp_path):
    context = 0.3 * torch.randn(4, 48, generator=random)
    unused = {"bias_vectors": torch.zeros(1, 48), "meta_net.linear1.weight": torch.zeros(48, 48)}
    save_dassl(tmp_path / "model.pth.tar-10", {"ctx": context, **(unused if method == "kgcoop" else {})}, buffers())
    assert bring_in(tmp_path / "model.pth.tar-10", model_folder, "--class-names", names) == 0
    learner, features = load_run("run", backbone=backbone), backbone.encode_images(images())
    assert (learner.method, learner.class_names) == (method, ("dark blue", "green", "red", "yellow"))
    text = padded_text(backbone, context.half().float()[None], learner.class_names)[0]
    torch.testing.assert_close(learner(features).logits, backbone.logit_scale * features.pooled @ text.T)


@pytest.mark.parametrize("position", ["middle", "front"])
def test_where_the_name_of_coop_stood_is_asked(position, model_folder, names, buffers, common, tmp_path):
    save_dassl(tmp_path / "c", {"ctx": torch.ones(4, 48)}, buffers())
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names, "--position", position) == 0
    assert load_run("run", device="cpu").position == position


@pytest.mark.parametrize("optimizer", [SGD, partial(Adam, eps=1e-3), partial(AdamW, eps=1e-3)])  # in half precision
@pytest.mark.parametrize("following", [partial(StepLR, step_size=3), partial(MultiStepLR, milestones=[3])])
def test_optimizers_and_schedulers_that_dassl_knows(optimizer, following, buffers, random, tmp_path):
    context = torch.randn(4, 48, generator=random)
    save_dassl(tmp_path / "c", {"ctx": context}, buffers(), optimizer, following)
    assert torch.equal(read_checkpoint(tmp_path / "c").learned["context"], context.half().float())


def test_class_specific_coop_counts_its_classes(model_folder, names, buffers, random, common, tmp_path, capsys):
    save_dassl(tmp_path / "c", {"ctx": torch.randn(4, 2, 48, generator=random)}, buffers())
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names) == 0
    assert load_run("run", device="cpu").class_specific
    names.write_text("one\ntwo\n")
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names) == 2
    assert "knows 4 classes, but 2 are named" in capsys.readouterr().err


def test_cocoop(backbone, model_folder, names, buffers, random, common, tmp_path):
    shapes = {"linear1.weight": (2, 32), "linear1.bias": (2,), "linear2.weight": (48, 2), "linear2.bias": (48,)}
    tensors = {f"meta_net.{name}": 0.3 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    tensors["ctx"] = 0.3 * torch.randn(4, 48, generator=random)
    save_dassl(tmp_path / "model.pth.tar-10", tensors, buffers())
    assert bring_in(tmp_path / "model.pth.tar-10", model_folder, "--class-names", names) == 0
    learner, features = load_run("run", backbone=backbone), backbone.encode_images(images())
    w1, b1, w2, b2 = (tensors[f"meta_net.{name}"].half().float() for name in shapes)
    shift = F.linear(F.linear(features.pooled, w1, b1).relu(), w2, b2)
    contexts = tensors["ctx"].half().float() + shift[:, None]
    text = padded_text(backbone, contexts, learner.class_names)  # (B, C, D)
    expected = backbone.logit_scale * (features.pooled[:, None] * text).sum(dim=-1)
    torch.testing.assert_close(learner(features).logits, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture
def gallop(random):
    return {
        "global_prompt": 0.3 * torch.randn(3, 4, 48, generator=random),
        "local_prompts": 0.3 * torch.randn(2, 4, 48, generator=random),
        "local_proj.linear.weight": torch.eye(64) + 0.1 * torch.randn(64, 64, generator=random),
    }


@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_gallop(kind, gallop, model_folder, photos, common, tmp_path):
    save_gallop(tmp_path / "gallop.ckpt", gallop, kind)
    assert bring_in(tmp_path / "gallop.ckpt", model_folder, "--data", photos) == 0
    learner = load_run("run", device="cpu")
    assert learner.class_names == NAMES  # with underscores, as its own code has them
    assert (learner.k, learner.dropout, len(learner.global_prompts)) == ((1, 3), 0.5, 3)
    torch.testing.assert_close(learner.global_prompts.data, gallop["global_prompt"])
    torch.testing.assert_close(learner.local_prompts.data, gallop["local_prompts"])
    torch.testing.assert_close(learner.local_projection.data, gallop["local_proj.linear.weight"])
    assert main(["evaluate", "run", "--no-cache"]) == 0


def test_gallop_without_the_arguments_of_its_script(gallop, random, model_folder, names, common, tmp_path):
    """Saved from DataParallel, by whatever code: the defaults of GalLoP's are taken."""
    gallop["local_prompts"] = 0.3 * torch.randn(4, 4, 48, generator=random)
    torch.save({"state_dict": {f"module.{name}": value for name, value in gallop.items()}}, tmp_path / "g")
    assert bring_in(tmp_path / "g", model_folder, "--class-names", names) == 0
    learner = load_run("run", device="cpu")
    assert (learner.k, learner.dropout) == ((5, 10, 15, 20), 0.75)
    torch.testing.assert_close(learner.local_prompts.data, gallop["local_prompts"])


def test_evaluate_asks_for_data_where_there_is_none(gallop, model_folder, names, common, tmp_path, capsys):
    save_gallop(tmp_path / "gallop.ckpt", gallop)
    assert bring_in(tmp_path / "gallop.ckpt", model_folder, "--class-names", names) == 0
    assert main(["evaluate", "run"]) == 2
    assert "expected a data folder to test on, as run was imported without one" in capsys.readouterr().err


class Bomb:
    """Makes "executed" when it is unpickled."""

    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        return self.how, ("executed",)


@pytest.mark.parametrize("how", [os.mkdir, logging.FileHandler])  # torch's reader blocks all that is in os
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_executed(how, zipped, common, tmp_path):
    content = {"state_dict": {"ctx": torch.zeros(4, 48)}, "args": Bomb(how)}
    torch.save(content, tmp_path / "bomb", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=f"without executing it, but it needs {how.__module__}.{how.__name__}$"):
        read_checkpoint(tmp_path / "bomb")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("prefix", ["", "module.", "prompt_learner.", "module.prompt_learner."])
@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.RAdam])
def test_what_is_harmless_beside_the_tensors_is_read(prefix, optimizer, tmp_path):
    context = torch.randn(4, 48)
    optimizer = optimizer([torch.nn.Parameter(context)])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    beside = {"best": np.float64(0.5), "curve": np.ones(3), "optimizer": optimizer.state_dict(), "schedule": schedule}
    torch.save({"state_dict": {f"{prefix}ctx": context}, **beside}, tmp_path / "c")
    read = read_checkpoint(tmp_path / "c")
    assert read.learner is CoOp and torch.equal(read.learned["context"], context)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (torch.ones(4, 48).to_sparse(), "sparse"),
        (torch.ones(4, 48).to("meta"), "without values"),
        (torch.zeros(1).expand(10**9, 48), r"expanded to shape \(1000000000, 48\)"),
        (torch.ones(4, 48).long(), "of torch.int64"),
        (torch.ones(0, 4, 48), r"got ctx \(empty, of shape \(0, 4, 48\)\)"),
        (torch.full((4, 48), float("nan")), r"got ctx \(not finite: NaN or infinity is among its numbers\)"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(context, words, vit_backbone, names, tmp_path):
    torch.save({"state_dict": {"ctx": context}}, tmp_path / "c")
    with pytest.raises(InputError, match=words):
        import_run(ImportConfig(file=tmp_path / "c", class_names=names, out=tmp_path / "run"), backbone=vit_backbone)
    assert not (tmp_path / "run").exists()


def test_bad_checkpoints_get_one_sentence(gallop, start, buffers, model_folder, names, common, tmp_path, capsys):
    file = tmp_path / "file"

    def complaint(*more):
        assert bring_in(file, model_folder, *(more or ("--class-names", names))) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no such file" in complaint()
    torch.save([1], file)
    whole = file.read_bytes()
    assert "it has no state_dict" in complaint()
    for damaged in (b"", b"{}", whole[:-20], whole.replace(b"data.pkl", b"data.xyz")):
        file.write_bytes(damaged)
        assert "must be a checkpoint" in complaint()
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, file)
    assert "expected the tensors of one of cocoop, coop, gallop, kgcoop, plot, got weight (1)" in complaint()
    save_gallop(file, {"global_prompt": gallop["global_prompt"], "local_prompts": gallop["local_prompts"]})
    assert "expected the tensor local_proj.linear.weight of gallop, got none" in complaint()
    save_gallop(file, gallop, topk=[1, 2, 3])
    assert "topk of its training script: expected 2 numbers, as local prompts, got [1, 2, 3]" in complaint()
    save_gallop(file, gallop, topk=5)
    assert "topk of its training script: expected Sequence[int], got 5" in complaint()
    save_gallop(file, gallop, global_dropout_p="0.5")
    assert "global_dropout_p of its training script: expected float, got '0.5'" in complaint()
    torch.save({"state_dict": gallop, "args": ["--topk", "5"]}, file)
    assert "expected args as a namespace or a dictionary, got a list" in complaint()
    torch.save({"state_dict": {"ctx": torch.zeros(48)}}, file)
    assert "ctx: expected a tensor with 2 or 3 axes, got shape (48,)" in complaint()
    torch.save({"state_dict": {"ctx": "words"}}, file)
    assert "got ctx (a str)" in complaint()
    save_gallop(file, {**gallop, "local_proj.linear.weight": torch.eye(65)})
    assert "expected the learned tensors local_projection (64, 64), got local_projection (65, 65)" in complaint()
    save_gallop(file, {**gallop, "global_prompt": torch.zeros(3, 4, 49)})
    assert "its tokens are 49 wide, and those of the text tower 48" in complaint()
    for name, value in buffers().items():
        for spoiled, words in (
            (value * float("nan"), f"expected {name} with 3 axes, got {name} (not finite"),
            (value[:, :0], f"expected {name} with 3 axes, got {name} (empty"),
            (value[..., :5], "its tokens are 5 wide, and those of the text tower 48"),
        ):
            save_dassl(file, {"ctx": torch.zeros(4, 48)}, {**buffers(), name: spoiled})
            assert words in complaint()
    save_dassl(file, {"ctx": torch.zeros(4, 48)}, {**buffers(), "token_prefix": (start + 0.5).expand(4, 1, -1).clone()})
    assert "its embedding of the start of text is a different one" in complaint()
    save_dassl(file, {"ctx": torch.zeros(4, 48)}, buffers())
    assert "expected either --data or --class-names" in complaint("--precision", "fp32")


def test_the_script_of_gallop_names_its_tower(gallop, vit_backbone, tmp_path):
    from fastprompt.exchange.import_run import _check_backbone
    from tests.models import make_backbone

    save_gallop(tmp_path / "file", gallop, clip_name="clip_vit_b32")
    checkpoint = read_checkpoint(tmp_path / "file")
    _check_backbone(checkpoint, make_backbone(vit_backbone.model, "ViT-B-32-quickgelu"))
    with pytest.raises(InputError, match="its training script was run with clip_vit_b32"):
        _check_backbone(checkpoint, make_backbone(vit_backbone.model, "ViT-B-16-quickgelu"))
    assert isinstance(argparse.Namespace(**checkpoint.arguments), argparse.Namespace)
