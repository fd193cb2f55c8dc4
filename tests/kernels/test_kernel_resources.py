"""The kernels compile for every target, within its registers and its shared memory, and as short as they were."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import kernel_resources as resources
from benchmarks import kernel_table

# The most shared memory that one program may use, and the registers that one thread may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 256}  # with 8 warps; gfx942 has 512 with 4
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
# Instructions of sm_90 an element of 256 columns, bf16: the selection alone, and with the selection bits of one scale.
BUDGET = {(4, False): 5, (8, False): 8.5, (16, False): 13.5, (32, False): 19.5, (8, True): 12, (16, True): 16.5}


def check(rows):
    """The requirements on every row."""
    for row in rows:
        assert row.spilled == 0, row
        few_warps = row.target == "gfx942" and "num_warps=4" in row.blocks
        assert row.registers <= REGISTERS[row.target] * (1 + few_warps), row
        assert row.shared <= SHARED[row.target], row
        if row.dtype != "fp32":
            assert TENSOR_CORE[row.target] in row.tensor_core.split(), row
        if row.per_element and row.dtype == "bf16" and row.patches == 256 and row.scales == 1:
            assert float(row.per_element) <= BUDGET.get((row.k, row.keep), 100), row


def telling(configuration):
    """Few configurations: each target, kernel and tile shape, and what comes closest to the limits."""
    name, target, dtype, patches, k, keep, scales = resources.key(configuration)[:7]
    if name.startswith("attention"):
        return dtype == "bf16" and {("BLOCK_S", 16), ("ALL", 1)} <= set(configuration.blocks)
    if name != "forward_kernel":
        int64 = ("INDEX", 64) in configuration.blocks
        return dtype == "bf16" and not int64 and (target != "gfx942" or patches == 0)
    if target == "sm_90":
        wanted = {(64, 16, True), (256, 8, True), (256, 16, True), (256, 16, False), (0, 16, True)}
        return scales == 1 and dtype == "bf16" and (patches, k, keep) in wanted
    return scales == 1 and dtype == "bf16" and (patches, k, keep) in {(256, 16, True), (0, 8, True)}


def test_telling_kernels_fit_their_targets(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    chosen = [str(i) for i, configuration in enumerate(resources.configurations()) if telling(configuration)]
    command = [sys.executable, "-m", "benchmarks.kernel_resources", *chosen]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = [resources.Row(**row) for row in json.loads(process.stdout)]
    assert {row.target for row in rows} == set(SHARED)
    assert {row.kernel for row in rows} == set(resources.KERNELS) - {"row_maximum_kernel"}
    assert {(16, False), (16, True)} <= {(row.k, row.keep) for row in rows if row.per_element}
    check(rows)


def test_the_table_is_that_of_the_present_kernels():
    table = kernel_table.read()
    expected = {resources.key(configuration) for configuration in resources.configurations()}
    missing = expected - {row.key for row in table}
    assert not missing, (
        f"run `python -m benchmarks kernel_resources`: {len(missing)} configurations are not in the table"
    )
    check(table)


@pytest.mark.parametrize("change", [{"spilled": 8}, {"registers": 257}, {"shared": 2**18}, {"tensor_core": ""}])
def test_the_check_sees_what_is_wrong(change):
    row = next(row for row in kernel_table.read() if row.dtype == "bf16")
    with pytest.raises(AssertionError):
        check([resources.Row(**{**row.__dict__, **change})])
