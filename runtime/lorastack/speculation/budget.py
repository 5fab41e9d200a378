"""How many nodes each row's tree has in a step, and whose heads run at all. Pure.

A step gives every row one token and each node's worth on top, for the seconds that its tokens cost.
What counts is tokens a second: a node pays only while it raises them, so trees shrink as rows come,
and vanish when a further token costs as much as a row's own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from math import inf

from lorastack.speculation.cost import CostCurve

_LOOK_EVERY = 8  # nodes after which `allot` asks whether more can be worth it


def allot(
    worths: Sequence[Iterable[float]],
    fixed_tokens: int,
    num_rows: int,
    cost: CostCurve,
    max_nodes: float = inf,
) -> list[int]:
    """Nodes per row that maximise (num_rows + worths) / cost.seconds(fixed_tokens + nodes).

    No more than `max_nodes` together.

    worths: of each row's candidates, non-increasing; where they end is the row's cap. Few more are
    read than get a node. fixed_tokens: the step's without any node. num_rows: rows that get a token
    of their own, with candidates or without. Ties go to fewer nodes.
    """
    iterators = [iter(of_row) for of_row in worths]
    nodes = [(-next(left, 0.0), row) for row, left in enumerate(iterators)]
    heapq.heapify(nodes)
    tokens, gain = fixed_tokens, float(num_rows)
    best_rate = gain / cost.seconds(tokens)
    taken: list[int] = []  # the row of each node taken
    best = 0
    while nodes and len(taken) < max_nodes:
        negative, row = nodes[0]
        # Nothing left is worth more, and no number of nodes costs less than this a node.
        if len(taken) % _LOOK_EVERY == 0 and -negative <= best_rate * cost.least_slope(tokens):
            break
        taken.append(row)
        tokens += 1
        gain -= negative
        rate = gain / cost.seconds(tokens)
        if rate > best_rate:
            best_rate, best = rate, len(taken)
        heapq.heapreplace(nodes, (-next(iterators[row], 0.0), row))
    counts = [0] * len(worths)
    for row in taken[:best]:
        counts[row] += 1
    return counts


def pays(
    worths: Sequence[Sequence[float]],
    fixed_tokens: int,
    num_rows: int,
    cost: CostCurve,
    heads_cost: CostCurve,
    max_nodes: float = inf,
) -> list[bool]:
    """True for the rows whose heads should run, to make the most tokens a second.

    worths: of each row with heads, the mean worths of its best nodes, best first. heads_cost:
    seconds over the number of rows whose heads run. The rest is as in `allot`. Rows are taken in
    order of what their nodes add, less what these cost at the rate without heads.
    """
    counts = allot(worths, fixed_tokens, num_rows, cost, max_nodes)
    alone = cost.seconds(fixed_tokens)
    price = (cost.seconds(fixed_tokens + sum(counts)) - alone) / max(sum(counts), 1)
    gains = [sum(row[:count]) for row, count in zip(worths, counts, strict=True)]
    rate = num_rows / alone

    def profit(row: int) -> float:
        return gains[row] - rate * price * counts[row]

    order = sorted((row for row, count in enumerate(counts) if count), key=profit, reverse=True)
    gain, tokens, best = float(num_rows), fixed_tokens, 0
    for number, row in enumerate(order, start=1):
        gain += gains[row]
        tokens += counts[row]
        faster = gain / (cost.seconds(tokens) + heads_cost.seconds(number))
        if faster > rate:
            rate, best = faster, number
    paying = set(order[:best])
    return [row in paying for row in range(len(worths))]
