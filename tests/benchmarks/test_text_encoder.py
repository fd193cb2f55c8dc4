"""The text passes beside each other: parts of the padded ones, and what all of them hold as a whole."""

from dataclasses import replace

import pytest
import torch

from benchmarks import text_encoder, text_memory
from benchmarks.measure import WrongResultError, check
from benchmarks.memory import Memory
from benchmarks.results import read_rows
from fastprompt.backbone import Backbone
from fastprompt.errors import InputError
from tests.models import make_backbone, make_clip

CPU = torch.device("cpu")
NAMES = ("banded", "polka-dotted", "lined", "crosshatched", "grid")
SHAPE = {"dtype": "float32", "G": 3, "M": 4, "C": len(NAMES), "names": "DTD"}
WHOLE = {**SHAPE, "sequences": 15}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(text_encoder, "load_backbone", _backbone)
    monkeypatch.setitem(text_encoder.NAMES, "DTD", NAMES)


def _backbone(*_, device, precision):
    return make_backbone(make_clip().to(torch.bfloat16 if precision == "bf16" else torch.float32))


def _case(shape):
    """All but the compiled peer."""
    case = text_encoder.build(shape, CPU)
    chosen = {name: run for name, run in case.implementations.items() if name != text_encoder.COMPILED}
    return replace(case, implementations=chosen)


@pytest.mark.parametrize(("sequences", "share"), [(15, None), (5, 3), (2, 7.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_have_the_results_of_the_whole(sequences, share, dtype):
    case = _case({**SHAPE, "dtype": dtype, "sequences": sequences})
    assert len(check(case)[0]) == 3
    assert case.shares.get(text_encoder.PADDED) == case.shares.get(text_encoder.TRUNCATED) == share
    assert text_encoder.OURS not in case.shares


@pytest.mark.parametrize("sequences", [15, 5, 2])
def test_padded_passes_encode_so_many_sequences_prompt_by_prompt(monkeypatch, sequences):
    seen, real = [], text_encoder.encode_padded

    def noting(model, context, ids):
        seen.append((len(context), len(ids)))
        return real(model, context, ids)

    monkeypatch.setattr(text_encoder, "encode_padded", noting)
    case = text_encoder.build({**SHAPE, "sequences": sequences}, CPU)
    for name in (text_encoder.PADDED, text_encoder.TRUNCATED):
        seen.clear()
        case.implementations[name]()
        assert all(prompts == 1 for prompts, _ in seen)
        assert sum(names for _, names in seen) == sequences


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_that_no_peer_encodes_is_checked_too(monkeypatch, dtype):
    real = Backbone.encode_prompts

    def wrong(self, context, class_tokens):
        features = real(self, context, class_tokens)
        return torch.cat([features[:2], features[2:].roll(1, dims=1)])

    monkeypatch.setattr(Backbone, "encode_prompts", wrong)
    with pytest.raises(WrongResultError, match="fastprompt: result 0"):
        check(_case({**SHAPE, "dtype": dtype, "sequences": 5}))


def test_what_is_weighed_is_whole():
    for device, shapes in text_memory.SHAPES.items():
        for shape in shapes:
            assert shape["sequences"] == shape["G"] * shape["C"], device
    case = text_encoder.build(WHOLE, CPU)
    assert set(text_memory.WEIGHED) < set(case.implementations) and not case.shares


def test_memory_is_written_with_how_many_times_less_it_is(monkeypatch, tmp_path):
    used = dict(zip(text_memory.WEIGHED, (Memory(1000, 900), Memory(400, 300), Memory(50, 40)), strict=True))
    monkeypatch.setattr(text_memory, "peak_memory", lambda build, shape, device, name: used[name])
    memory = text_memory.weigh(WHOLE, CPU)
    text_memory.write(WHOLE, CPU, memory, tmp_path / "text_encoder_memory.csv")
    rows = read_rows(tmp_path / "text_encoder_memory.csv")
    assert [(row["implementation"], row["peak_memory_mb"], row["times_less"]) for row in rows] == [
        ("77 tokens", "1000.0", "1.000"),
        ("longest name", "400.0", "2.500"),
        ("fastprompt", "50.0", "20.000"),
    ]
    assert {row["baseline"] for row in rows} == {"77 tokens"} and rows[0]["sequences"] == "15"
    assert "20.00*" in text_memory.table(WHOLE, memory).to_text()


def test_what_does_not_fit_on_a_gpu_has_no_row_and_the_others_have(monkeypatch, tmp_path, capsys):
    def weigh(build, shape, device, name):
        if name == text_encoder.PADDED:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Memory(50, 40)

    monkeypatch.setattr(text_memory, "peak_memory", weigh)
    memory = text_memory.weigh(WHOLE, CPU)
    assert "77 tokens does not fit into the memory of this device" in capsys.readouterr().out
    text_memory.write(WHOLE, CPU, memory, tmp_path / "text_encoder_memory.csv")
    rows = read_rows(tmp_path / "text_encoder_memory.csv")
    assert [(row["implementation"], row["times_less"]) for row in rows] == [("longest name", ""), ("fastprompt", "")]
    assert "50.0" in text_memory.table(WHOLE, memory).to_text()


def test_shapes_of_a_gpu_have_as_many_classes_as_imagenet_and_an_attention_of_16_bits():
    shapes, quick = (kind["cuda"] for kind in (text_encoder.BENCHMARK.shapes, text_encoder.BENCHMARK.quick_shapes))
    assert {shape["dtype"] for shape in shapes if shape["C"] == 1000} == {"float32", "bfloat16"}
    assert {shape["dtype"] for shape in quick} == {"float32", "bfloat16"}
    assert all(len(set(names)) == len(names) for names in text_encoder.NAMES.values())


def test_where_memory_is_not_told_nothing_is_made_up(monkeypatch):
    monkeypatch.setattr(text_memory, "peak_memory", lambda *_: None)
    with pytest.raises(InputError, match="peak memory is measured on Linux"):
        text_memory.weigh(WHOLE, CPU)
