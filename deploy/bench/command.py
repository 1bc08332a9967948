"""`vespo bench NAME`: run a benchmark and print its figures."""

from typing import Annotated

import typer

from deploy.bench import BENCHES


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(BENCHES)}; or all, one by one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Run everything once, briefly: not to be quoted.")] = False,
) -> None:
    """Measure: medians over interleaved rounds, beside what they are compared with, and held to targets."""
    import json

    from deploy.bench.harness import format_report, names_of, run_bench

    reports = []
    for each in names_of(name):
        reports.append(run_bench(each, quick=quick))
        if not as_json:
            print(format_report(reports[-1]), flush=True)
    if as_json:
        print(json.dumps({"benches": reports} if name == "all" else reports[0]))
