"""The kernels compile for every target, within its registers and its shared memory, and as short as they were."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import triton

from benchmarks import kernel_configurations, kernel_table, results, triton_row_maximum
from benchmarks import kernel_resources as resources
from benchmarks.kernel_instructions import instructions

# The most shared memory that one program may use, and the registers that one thread may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 256}  # with 8 warps; gfx942 has 512 with 4
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
# Instructions of sm_90 an element of 256 columns, bf16: by K, whether selection bits are written, and their scales. No
# version of Triton that was surveyed needs more.
BUDGET = {
    (4, False, 1): 5, (8, False, 1): 8.5, (16, False, 1): 13.5, (32, False, 1): 19.5,
    (4, True, 1): 8.5, (8, True, 1): 12, (16, True, 1): 16.5, (32, True, 1): 35.5, (16, True, 4): 29.5,
}  # fmt: skip


def check(rows):
    """What holds on every target, whatever compiled the kernels."""
    for row in rows:
        assert row.spilled == 0, row
        few_warps = row.target == "gfx942" and "num_warps=4" in row.blocks
        assert row.registers <= REGISTERS[row.target] * (1 + few_warps), row
        assert row.shared <= SHARED[row.target], row
        if row.dtype != "fp32":
            assert TENSOR_CORE[row.target] in row.tensor_core.split(), row


def check_instructions(row):
    assert float(row.per_element) <= BUDGET[row.k, row.keep, row.scales], row


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Rows of few configurations, compiled by the Triton that is installed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    chosen = [
        str(i)
        for i, configuration in enumerate(kernel_configurations.configurations())
        if kernel_configurations.telling(configuration)
    ]
    command = [sys.executable, "-m", "benchmarks.kernel_resources", *chosen]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return [resources.Resources(**row) for row in json.loads(process.stdout)]


@pytest.mark.compile
def test_telling_kernels_fit_their_targets(compiled):
    assert {row.target for row in compiled} == set(SHARED)
    assert {row.kernel for row in compiled} == set(kernel_configurations.KERNELS) - {"row_maximum_kernel"}
    check(compiled)


@pytest.mark.compile
def test_telling_kernels_are_as_short_as_this_version_of_triton_made_them(compiled):
    surveyed = {row.key: row for row in kernel_table.read(kernel_table.COUNTED)}
    versions = sorted({row.triton for row in surveyed.values()})
    counted = [row for row in compiled if row.per_element]
    assert {(8, True), (16, False)} == {(row.k, row.keep) for row in counted}
    if triton.__version__ not in versions:
        found = ", ".join(f"{row.per_element} (k={row.k}, bits={row.keep})" for row in counted)
        pytest.skip(
            f"instructions are known for Triton {', '.join(versions)}, not for {triton.__version__}, which needs "
            f"{found}: `python -m benchmarks kernel_resources --counted` adds it"
        )
    for row in counted:
        assert float(row.per_element) <= float(surveyed[row.key].per_element), row


def test_the_rows_of_the_table_are_those_of_present_kernels_and_hold_all_telling_ones():
    table = kernel_table.read()
    (version,) = {row.triton for row in table}  # of one version of Triton, which need not be the one installed here
    everything = list(kernel_configurations.configurations())
    found = {row.key for row in table}
    assert len(table) == len(found)
    old = found - {kernel_configurations.key(one, version) for one in everything}
    assert not old, f"run `python -m benchmarks kernel_resources`: {len(old)} rows belong to no present kernel"
    assert {
        kernel_configurations.key(one, version) for one in everything if kernel_configurations.telling(one)
    } <= found
    check(table)


@pytest.mark.torture
def test_the_table_has_every_configuration():
    table = kernel_table.read()
    version, found = table[0].triton, {row.key for row in table}
    missing = {kernel_configurations.key(one, version) for one in kernel_configurations.configurations()} - found
    assert not missing, f"run `python -m benchmarks kernel_resources`: {len(missing)} configurations are missing"


def test_instructions_are_within_the_budget_with_every_version_that_was_surveyed():
    counted = kernel_table.read(kernel_table.COUNTED)
    versions = {row.triton for row in counted}
    assert {row.triton for row in kernel_table.read()} <= versions
    chosen = [one for one in kernel_configurations.configurations() if kernel_configurations.has_budget(one)]
    expected = {kernel_configurations.key(one, version) for one in chosen for version in versions}
    assert {row.key for row in counted} == expected, "run `python -m benchmarks kernel_resources --counted`"
    for row in counted:
        check_instructions(row)


CHANGES = [{"spilled": 8}, {"registers": 257}, {"shared": 2**18}, {"tensor_core": ""}]


@pytest.mark.parametrize("change", CHANGES)
def test_the_check_sees_what_is_wrong(change):
    row = kernel_table.read(kernel_table.COUNTED)[0]
    check([row])
    with pytest.raises(AssertionError):
        check([replace(row, **change)])
    with pytest.raises(AssertionError):
        check_instructions(replace(row, per_element="36"))


def listing(*lines):
    """As cuobjdump prints it: an address, an instruction, its encoding."""
    return "\n".join(
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x00000000000079af */" for i, line in enumerate(lines)
    )


LISTINGS = {
    "skipped by a branch": ["MOV R1", "HGMMA.64x256x16 R24", "@!P0 BRA 0x0050", "FADD R1", "FADD R1", "EXIT"],
    "behind the end": ["MOV R1", "HGMMA.64x256x16 R24", "@P0 BRA 0x0040", "EXIT", "FADD R1", "BRA 0x0030"],
    "jumped over": ["MOV R1", "HGMMA.64x256x16 R24", "BRA !P1, 0x0050", "FADD R1", "FADD R1", "EXIT"],
    "of parted threads": ["MOV R1", "HGMMA.64x256x16 R24", "BRA.DIV UR4, 0x0040", "EXIT", "FADD R1", "BRA 0x0030"],
}


@pytest.mark.parametrize("lines", LISTINGS.values(), ids=LISTINGS)
def test_instructions_that_only_run_for_ties_are_not_counted(lines):
    assert instructions(listing(*lines)) == 4


def test_loops_count_once_and_the_loop_of_the_product_is_not_skipped():
    lines = ["@P0 BRA 0x0050", "LDS R1", "HGMMA.64x256x16 R24", "NOP", "@!P1 BRA 0x0010", "FADD R1", "@P2 EXIT"]
    assert instructions(listing(*lines, "BRA 0x0070")) == 6


def test_the_key_follows_the_yardstick_and_the_compiler(monkeypatch):
    forward = next(one for one in kernel_configurations.configurations() if one.kernel == "forward_kernel")
    before = kernel_configurations.key(forward)
    assert kernel_configurations.key(forward, "another version") != before
    kernel_configurations.source.cache_clear()
    code = inspect.getsource(triton_row_maximum).replace("tl.max(", "tl.min(")
    monkeypatch.setattr(inspect, "getsource", lambda module, real=inspect.getsource: (
        code if module is triton_row_maximum else real(module)
    ))  # fmt: skip
    try:
        assert kernel_configurations.key(forward) != before
    finally:
        kernel_configurations.source.cache_clear()


def test_the_table_is_completed_and_what_is_no_longer_launched_is_dropped(monkeypatch, tmp_path):
    file, table = tmp_path / "table.csv", kernel_table.read()
    some = [one for one in kernel_configurations.configurations() if one.kernel == "grad_prompts_kernel"][:2]
    version, by_key = table[0].triton, {row.key: row for row in table}
    first, second = (by_key[kernel_configurations.key(one, version)] for one in some)
    results.append_rows(file, [asdict(table[0]), asdict(first)])
    monkeypatch.setattr(kernel_table, "configurations", lambda: some)
    monkeypatch.setattr(kernel_table, "key", lambda one: kernel_configurations.key(one, version))
    monkeypatch.setattr(
        kernel_table, "survey", lambda missing: [by_key[kernel_configurations.key(one, version)] for one in missing]
    )
    kernel_table.update(file)
    assert kernel_table.read(file) == [first, second]


def test_counted_instructions_of_other_versions_stay(monkeypatch, tmp_path):
    file, (row, *_) = tmp_path / "table.csv", kernel_table.read(kernel_table.COUNTED)
    other, old = replace(row, triton="other"), replace(row, triton="other", source="of before")
    results.append_rows(file, [asdict(other), asdict(old)])
    monkeypatch.setattr(kernel_table, "survey", lambda missing: [replace(row, triton="new")])
    kernel_table.update_counted(file)
    assert kernel_table.read(file) == [other, replace(row, triton="new")]


@pytest.mark.compile
def test_what_changes_from_call_to_call_compiles_no_kernel_anew():
    code = """
from benchmarks.kernel_configurations import KERNELS
for kernel, _ in KERNELS.values():
    for one in kernel.params:
        if not one.do_not_specialize and not one.do_not_specialize_on_alignment and not one.is_constexpr:
            print(one.name)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    specialized = set(process.stdout.split())
    assert "D" in specialized
    assert specialized.isdisjoint({"B", "C", "P", "X", "ROWS", "MINE", "OTHERS", "PER_SPLIT", "rows", "T", "S", "E"})
    assert specialized.isdisjoint({"MINE_INNER", "OTHERS_INNER"})  # but for being 1
