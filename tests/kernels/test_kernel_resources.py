"""The kernels compile for every target, within its registers and its shared memory, and as short as they were."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from benchmarks import kernel_configurations, kernel_table, results, triton_row_maximum
from benchmarks import kernel_resources as resources

# The most shared memory that one program may use, and the registers that one thread may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 256}  # with 8 warps; gfx942 has 512 with 4
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
# Instructions of sm_90 an element of 256 columns, bf16: by K, whether selection bits are written, and their scales.
BUDGET = {
    (4, False, 1): 5, (8, False, 1): 8.5, (16, False, 1): 13.5, (32, False, 1): 19.5,
    (4, True, 1): 8.5, (8, True, 1): 12, (16, True, 1): 16.5, (32, True, 1): 35.5, (16, True, 4): 29.5,
}  # fmt: skip


def check(rows):
    """The requirements on every row."""
    for row in rows:
        assert row.spilled == 0, row
        few_warps = row.target == "gfx942" and "num_warps=4" in row.blocks
        assert row.registers <= REGISTERS[row.target] * (1 + few_warps), row
        assert row.shared <= SHARED[row.target], row
        if row.dtype != "fp32":
            assert TENSOR_CORE[row.target] in row.tensor_core.split(), row
        if has_budget(row):
            assert float(row.per_element) <= BUDGET[row.k, row.keep, row.scales], row


def has_budget(row):
    """Whether its instructions are counted, on the tile that the budget is for."""
    return row.per_element and row.dtype == "bf16" and row.patches == 256


def telling(configuration):
    """Few configurations: each target, kernel and tile shape, and what comes closest to the limits."""
    name, target, dtype, patches, k, keep, scales = kernel_configurations.key(configuration)[:7]
    int64 = ("INDEX", 64) in configuration.blocks
    if name == "sinkhorn_kernel":
        return not int64 and patches == 196
    if name.startswith("attention"):
        return dtype == "bf16" and {("BLOCK_S", 16), ("ALL", 1)} <= set(configuration.blocks)
    if name == "resized_crop_kernel":
        return {("LEVELS", 1), ("CUBIC", 1)} <= set(configuration.blocks)
    if name != "forward_kernel":
        return dtype == "bf16" and not int64 and (target != "gfx942" or patches == 0)
    if target == "sm_90":
        wanted = {(64, 16, True), (256, 8, True), (256, 16, True), (256, 16, False), (0, 16, True)}
        return scales == 1 and dtype == "bf16" and (patches, k, keep) in wanted
    return scales == 1 and dtype == "bf16" and (patches, k, keep) in {(256, 16, True), (0, 8, True)}


def test_telling_kernels_fit_their_targets(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    chosen = [
        str(i) for i, configuration in enumerate(kernel_configurations.configurations()) if telling(configuration)
    ]
    command = [sys.executable, "-m", "benchmarks.kernel_resources", *chosen]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = [resources.Resources(**row) for row in json.loads(process.stdout)]
    assert {row.target for row in rows} == set(SHARED)
    assert {row.kernel for row in rows} == set(kernel_configurations.KERNELS) - {"row_maximum_kernel"}
    assert {(16, False), (16, True)} <= {(row.k, row.keep) for row in rows if row.per_element}
    check(rows)


def test_the_table_is_that_of_the_present_kernels():
    table = kernel_table.read()
    (version,) = {row.triton for row in table}  # of one version of Triton, which need not be the one installed here
    expected = {
        kernel_configurations.key(configuration, version) for configuration in kernel_configurations.configurations()
    }
    found = {row.key for row in table}
    assert found == expected, (
        f"run `python -m benchmarks kernel_resources`: {len(expected - found)} configurations are not in the table, "
        f"and {len(found - expected)} rows of it belong to none"
    )
    assert len(table) == len(found)
    assert {(row.k, row.keep, row.scales) for row in table if has_budget(row)} == set(BUDGET)
    check(table)


CHANGES = [{"spilled": 8}, {"registers": 257}, {"shared": 2**18}, {"tensor_core": ""}, {"per_element": "36"}]


@pytest.mark.parametrize("change", CHANGES)
def test_the_check_sees_what_is_wrong(change):
    row = next(row for row in kernel_table.read() if has_budget(row))
    check([row])
    with pytest.raises(AssertionError):
        check([replace(row, **change)])


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
