"""How many machine instructions of a kernel run for a tile in which no similarities tie."""

import re
from heapq import heappop, heappush
from itertools import pairwise

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z0-9_.]+)([^;]*);")


def instructions(code: str) -> int:
    """Count those on the shortest way through a listing of cuobjdump that passes every product in its order.

    A loop counts once. What only runs where similarities tie is left out wherever the compiler has put it: between the
    product and the end, behind the end, or on a way back. So is what only runs where the threads of a warp have parted
    (BRA.DIV), which they have not.

    Raises:
        ValueError: the listing has no such way.
    """
    lines = LINE.findall(code)
    places = {int(address, 16): place for place, (address, *_) in enumerate(lines)}
    products = [place for place, (*_, name, _) in enumerate(lines) if "MMA" in name.split(".")[0]]
    end = max(place for place, (*_, name, _) in enumerate(lines) if name == "EXIT")
    stops = [0, *products, end]
    return 1 + sum(_shortest(lines, places, start, stop) for start, stop in pairwise(stops))


def _shortest(lines: list[tuple[str, ...]], places: dict[int, int], start: int, stop: int) -> int:
    """The fewest instructions between two places of a listing, the latter not counted."""
    waiting, known = [(0, start)], {start: 0}
    while waiting:
        count, place = heappop(waiting)
        if place == stop:
            return count
        count += lines[place][2] != "NOP"
        for following in _following(lines, places, place):
            if count < known.get(following, count + 1):
                known[following] = count
                heappush(waiting, (count, following))
    raise ValueError(f"code: expected a way from instruction {start} to instruction {stop}, got none")


def _following(lines: list[tuple[str, ...]], places: dict[int, int], place: int) -> list[int]:
    """The places that may be next. A branch asks a predicate before its name, or before its target."""
    _, guard, name, operands = lines[place]
    following = [place + 1] if place + 1 < len(lines) else []
    if name != "BRA":
        return following
    target = places[int(re.search(r"0x([0-9a-f]+)", operands).group(1), 16)]
    return [target, *following] if guard or re.search(r"\bU?P\d", operands) else [target]
