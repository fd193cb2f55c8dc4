"""Compile the telling kernels with the Triton that is installed: one line of JSON each, whatever comes of others."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.kernel_configurations import Configuration, configurations, key, telling


def try_to_compile(configuration: Configuration) -> dict[str, object]:
    """What a kernel needs, or why this version of Triton refuses it."""
    from benchmarks.kernel_resources import examine

    names = ("kernel", "target", "dtype", "patches", "k", "keep", "scales", "blocks")
    row = dict(zip(names, key(configuration), strict=False))
    try:
        found = examine(configuration)
    except Exception as error:  # noqa: BLE001 (of any kind: what a compiler fails with is what is looked for)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return {**row, "registers": 0, "spilled": 0, "shared": 0, "tensor_core": "", "refused": said[:200]}
    needs = {name: getattr(found, name) for name in ("registers", "spilled", "shared", "tensor_core")}
    return {**row, **needs, "refused": ""}


if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for row in pool.map(try_to_compile, [one for one in configurations() if telling(one)]):
            print(json.dumps(row), flush=True)
