"""The card of a learner on the Hub: filled from the learner, nothing left to be written."""

from huggingface_hub import ModelCard, ModelHubMixin

from fastprompt import CoOp, GalLoP
from fastprompt.training import TrainingSettings


def test_the_card_says_what_the_learner_is(vit_backbone, tmp_path):
    learner = GalLoP(vit_backbone, ["cat", "ring_<b>ed|seal", *(f"class {number}" for number in range(30))])
    facts = {"settings": TrainingSettings(epochs=7), "accuracy": 0.6789, "repo_id": "me/gallop"}
    learner.save_pretrained(tmp_path, model_card_kwargs=facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "fastprompt" and card.data.tags == ["clip", "prompt-learning", "gallop"]
    count = sum(parameter.numel() for parameter in learner.parameters())
    for words in (
        "# GalLoP: 32 classes on test",
        "GalLoP: global prompts for the image",
        "weights random, frozen; fingerprint 0000000000000000",
        f"| Learned numbers | {count:,} |",
        "epochs=7",
        "67.9 % of the test images",
        r"Classes: cat, ring\_\<b\>ed\|seal, class 0,",
        "class 17 and 12 more.",
        'from_pretrained("me/gallop")',
    ):
        assert words in card.text, words
    assert "More Information Needed" not in card.text


def test_a_card_on_the_hub_names_its_repository(vit_backbone, monkeypatch):
    pushed = {}
    monkeypatch.setattr(ModelHubMixin, "push_to_hub", lambda self, repo_id, **given: pushed.update(given))
    learner = CoOp(vit_backbone, ["cat", "dog"])
    learner.push_to_hub("me/coop", model_card_kwargs={"accuracy": 0.5}, private=True)
    assert pushed == {"model_card_kwargs": {"repo_id": "me/coop", "accuracy": 0.5}, "private": True}
    assert 'from_pretrained("me/coop")' in learner.generate_model_card(**pushed["model_card_kwargs"]).text


def test_what_is_not_known_is_said(vit_backbone, tmp_path):
    CoOp(vit_backbone, ["cat", "dog"]).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| Training | not recorded |" in text and "| Accuracy | not recorded |" in text
