"""Benchmarks, `vespo bench NAME`: what the documentation and the targets of this project are measured by.

To add a bench, write a module here and name it in `BENCHES`. The module has

    TARGETS: tuple[Target, ...]                        what its figures are held to; may be empty
    def rounds(quick: bool) -> Iterator[Round]: ...    measures everything once a round, and yields it

`Target` and `Round` are in `deploy.bench.harness`, which turns rounds into medians with their spread, compares them
with the targets, and prints. A round is a dict: figure → `Reading(value, unit)`. What is compared is measured within
one round, back to back and in an order that alternates from round to round, and their ratio is a figure of that round:
so that what else the machine does meets both. A figure need not be in every round. `quick` asks for the shortest thing
that exercises every path, which the tests do. Say where a measurement stands by `progress`; what is written to standard
output meanwhile ends on standard error. Heavy imports belong into functions.
"""

BENCHES = {
    "buffer": "deploy.bench.buffer",
    "loss": "deploy.bench.loss",
    "scale": "deploy.bench.scale",
    "weights": "deploy.bench.weights",
}
"""Benches and their modules, in the order of `vespo bench all`."""
