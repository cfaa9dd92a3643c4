"""Plans and runs as pictures in a notebook.

    %load_ext resist

After that a `Plan`, a `RoundPlan`, a `Job` and a `History` show themselves where they are the last line of a cell.
`draw_plans` draws several rounds at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from resist.errors import UserError
from resist.planning.plan import Plan, RoundPlan
from resist.report.aggregate import holdings_of
from resist.report.page import page
from resist.report.plan_map import map_svg
from resist.report.plan_view import partition_lines, partition_svg
from resist.runs.history import History

PATHS = 4  # rounds up to which the path through each sub-network is drawn
FRAME = "width:100%;height:min(85vh,1000px);border:1px solid #8d949e;border-radius:6px;resize:vertical"


@dataclass(frozen=True, repr=False)
class Picture:
    """A drawing that a notebook shows, and text where there is no notebook.

    Attributes:
        svg: The drawing, a whole SVG file.
        text: The same as text.
    """

    svg: str
    text: str

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return self.text


def draw_plans(plans: Sequence[Plan | RoundPlan], chains: Sequence[Any] = (), *, first_round: int = 1) -> Picture:
    """Draw which worker holds which block.

        draw_plans([job.plan_of(round) for round in range(job.round)], job.chains)

    Up to four rounds are drawn as the path through each sub-network, more as a map with a column for each round.

    Args:
        plans: The plans of consecutive rounds, of the same chains.
        chains: The chains, whose names are shown, or the names themselves. Default: "chain 0", "chain 1" and so on.
        first_round: Number of the first of these rounds; people count them from 1.

    Returns:
        The picture. Save it by `Path("plans.svg").write_text(picture.svg)`.

    Raises:
        UserError: There is no plan, or the plans or names are not of the same chains.
    """
    rounds = [plan.plans if isinstance(plan, RoundPlan) else (plan,) for plan in plans]
    if not rounds:
        raise UserError("plans is empty; give the plan of at least one round")
    sizes = {(tuple(plan.num_blocks for plan in of_round)) for of_round in rounds}
    if len(sizes) > 1:
        raise UserError(f"plans have chains of different lengths ({sorted(sizes)}); give plans of one job")
    blocks = sizes.pop()
    names = [str(getattr(chain, "name", chain)) for chain in chains] or [f"chain {i}" for i in range(len(blocks))]
    if len(names) != len(blocks):
        raise UserError(f"chains has {len(names)} names, and the plans are of {len(blocks)} chains; give one for each")
    numbers = range(first_round, first_round + len(rounds))
    of_chain = [[of_round[i].blocks for of_round in rounds] for i in range(len(blocks))]
    lines = [
        f"Which worker holds which block of {name}\n"
        + "\n".join(line.plain for line in partition_lines(num, held[:PATHS], 100, first_round=first_round))
        for name, num, held in zip(names, blocks, of_chain, strict=True)
    ]
    more = f"\n(and {len(rounds) - PATHS} rounds more)" if len(rounds) > PATHS else ""
    if len(rounds) > PATHS:
        maps = [holdings_of(name, held, numbers) for name, held in zip(names, of_chain, strict=True)]
        return Picture(map_svg(maps), "\n".join(lines) + more)
    description = {
        "chains": [{"name": name, "blocks": num} for name, num in zip(names, blocks, strict=True)],
        "held_by_worker": [0] * len(of_chain[0][0]),
        "rounds": [
            {"round": number, "plan": {name: held[i] for name, held in zip(names, of_chain, strict=True)}}
            for i, number in enumerate(numbers)
        ],
    }
    return Picture(partition_svg(description), "\n".join(lines))


def run_html(history: History) -> str:
    """The report of a run as HTML for the output of a notebook's cell; its styles keep to it."""
    return f'<iframe style="{FRAME}" title="report of a run" srcdoc="{escape(page([history]))}"></iframe>'


def register(shell: Any) -> None:
    """Make plans, jobs and runs show themselves in an IPython shell.

    Args:
        shell: The `InteractiveShell`, which `%load_ext` passes.
    """
    formatters = shell.display_formatter.formatters
    svg, text = formatters["image/svg+xml"], formatters["text/plain"]
    for kind in (Plan, RoundPlan):
        svg.for_type(kind, lambda plan: draw_plans([plan]).svg)
    svg.for_type_by_name("resist.job", "Job", lambda job: _draw_job(job).svg)
    text.for_type_by_name("resist.job", "Job", lambda job, printer, cycle: printer.text(_draw_job(job).text))
    formatters["text/html"].for_type(History, run_html)


def _draw_job(job: Any) -> Picture:
    return draw_plans([job.plan], job.chains, first_round=job.round + 1)
