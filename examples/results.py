"""The page of the lectures' tables, made from the records of examples/tables.py beside the published figures.

    python examples/results.py

Cells of one table share data, schedule, seed, gradient and commit; others stand in a table of their own. What has no
record, for instance because it was interrupted, is named as not run.
"""

import textwrap
from collections import Counter
from itertools import pairwise
from pathlib import Path

import head
import published
import records
import tables

from pyrovae import runs
from pyrovae.plots import charts, images

TITLES = {
    "A": "Table A: likelihoods and active units",
    "B": "Table B: two stages",
    "C": "Table C: 64 samples, spent in several ways",
}
DATA = {"mnist": "MNIST", "omniglot28": "OMNIGLOT", "digits": "Embedded digits"}
OF_A_CELL = ("layers", "objective", "particles", "groups", "gradient", "beta", "continues")
FIGURES = {"IWAE-64": "iwae_64", "log p-hat": "log_p", "-KL": "minus_kl"}
HEAD = """# The lectures' tables

This page is made by `python examples/results.py` from the records beside it, one JSON file for each cell that was
trained to its end; it is not edited by hand. NLL is in nats per test image, ± its standard error over draws, and a
difference is our figure minus the published one. The published cells had 3,280 epochs in batches of 20. The cells of
one table have data, schedule, seed, gradient and commit in common. A cell that was not trained, or not to its end, is
*not run*.
"""


def number_of(cell):
    """What sets a cell apart within its table: of a cell or of a record."""
    values = cell if isinstance(cell, dict) else vars(cell)
    return tuple(values.get(key) for key in ("layers", "objective", "groups", "particles", "beta"))


def common(record):
    """What the cells of one table share."""
    asked, first = records.asked(record), record.get("continues")
    gradients = {record["gradient"], (first or record)["gradient"]}
    shared = {key: value for key, value in asked.items() if key not in OF_A_CELL}
    if first:
        shared["continues"] = {key: value for key, value in first.items() if key not in OF_A_CELL}
    return shared | {"gradient": max(gradients, key=lambda name: name != "total"), "commit": record["commit"]}


def grouped(found):
    """The records that stand together, as (what they share, records by cell); the fullest tables first."""
    groups = {}
    for record in found:
        shared = common(record)
        groups.setdefault(records.digest(shared), (shared, {}))[1][number_of(record)] = record
    return sorted(groups.values(), key=lambda group: (-len(group[1]), group[0]["dataset"], str(group[0])))


def table(columns, rows):
    """A table in Markdown; None is a dash."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def against(ours, theirs):
    """Our figure, the published one, and the difference."""
    return [f"{ours:.2f}", *(("–", "–") if theirs is None else (f"{theirs:.2f}", f"{ours - theirs:+.2f}"))]


def active(record, how="at_one_draw"):
    return "+".join(str(units[how]) for units in record["active_units"].values())


def costs(record):
    heavy = record.get("unreliable")
    return [None if heavy is None else f"{heavy:.0%}", record["epochs"], f"{record['cpu_minutes']:.0f}"]


COSTS = ["Pareto k > 0.7", "epochs", "CPU minutes"]


def rows_a(cell, record, theirs, _):
    nll, units = theirs.get((cell.layers, cell.objective, cell.particles), (None, None))
    ours, *rest = against(record["nll"], nll)
    return [f"{ours} ± {record['nll_std_error']:.1g}", *rest, active(record), active(record, "averaged"), units]


def rows_b(cell, record, theirs, found):
    nll, units = theirs.get((cell.objective, cell.particles), (None, None))
    first = found.get(record["continued"]["record"])
    before = None if first is None else f"{first['nll']:.2f}, {active(first)}"
    ours, *rest = against(record["nll"], nll)
    return [before, f"{ours} ± {record['nll_std_error']:.1g}", *rest, active(record), units]


def rows_c(cell, record, theirs, _):
    pairs = theirs.get((cell.objective, cell.groups, cell.particles, cell.beta), [(None, None)] * 3)
    row = []
    for name, (value, spread) in zip(FIGURES.values(), pairs, strict=True):
        ours, known, difference = against(record[name], value)
        row += [ours, known if spread is None else f"{known} ± {spread:.2f}", difference]
    return [*row, active(record)]


BEYOND = ["published", "difference"]
LAYOUT = {  # columns, what fills them, what they stand beside
    "A": (["NLL", *BEYOND, "active units", "averaged", "published"], rows_a, published.IMPORTANCE_WEIGHTED),
    "B": (["first stage", "NLL", *BEYOND, "active units", "published"], rows_b, published.SECOND_STAGE),
    "C": ([c for name in FIGURES for c in (name, *BEYOND)] + ["active units"], rows_c, published.TIGHTER),
}
CURVES = "The curves are of the first {images} test images, log p-hat in them from {samples:,} samples."
NOTES = {
    "A": (
        "IWAE with k = 1 is the VAE. Active units of the second layer: at one draw of the first, as the paper's code "
        "counts them, and averaged over 64 draws, as the paper defines them."
    ),
    "B": "The first stage is table A's cell: NLL and active units of its record. Epochs and minutes are the second's.",
    "C": (
        "IWAE-64 is $L_{64}$, the mean of ten draws of it, log p-hat the negative NLL, and -KL = IWAE-64 - log p-hat; "
        "± is the published spread over four runs."
    ),
}


def first_layer(record):
    return next(iter(record["active_units"].values()))["at_one_draw"]


def orderings_a(by_cell, _):
    """How many of the orderings that the paper found hold here, and which do not."""
    of = {(layers, name, k): record for (layers, name, _, k, _), record in by_cell.items()}
    of |= {(layers, "IWAE", 1): record for (layers, name, k), record in of.items() if (name, k) == ("VAE", 1)}
    rising = [((n, "IWAE", more), (n, "IWAE", k)) for n in (1, 2) for k, more in pairwise((1, 5, 50))]
    claims = {
        "IWAE is better than VAE": [((n, "IWAE", k), (n, "VAE", k)) for n in (1, 2) for k in (5, 50)],
        "IWAE is better with more particles": rising,
        "two layers are better than one": [((2, *bound), (1, *bound)) for bound in tables.BOUNDS],
        "IWAE has more active units in the first layer with more particles": rising,
    }
    for claim, pairs in claims.items():
        value = first_layer if "active" in claim else lambda record: -record["nll"]
        known = [(a, b) for a, b in pairs if a in of and b in of]
        wrong = ["{1} k = {2}, {0} layer(s)".format(*a) for a, b in known if not value(of[a]) > value(of[b])]
        if known:
            yield f"{claim}: {len(known) - len(wrong)} of {len(known)}" + (f"; not {'; '.join(wrong)}" if wrong else "")


def orderings_b(*_):
    return ()


def orderings_c(by_cell, theirs):
    """The cells from the best to the worst by each figure, here and as published."""
    known = {number: cell.stages for cell in tables.TABLES["c"] if (number := number_of(cell)) in by_cell}
    for i, (figure, name) in enumerate(FIGURES.items()):
        ours = sorted(known, key=lambda number: -by_cell[number][name])
        yield f"{figure}, best first: {'; '.join(known[number] for number in ours)}"
        if theirs:
            papers = sorted(known, key=lambda number: -theirs[number[1:]][i][0])
            yield f"{figure} as published: {'; '.join(known[number] for number in papers)}"


def counted(values):
    """Each value, and how many there are of it where they differ."""
    counts = Counter(map(str, values))
    return "; ".join(f"{value} ({count})" if len(counts) > 1 else value for value, count in counts.items())


def schedule(shared):
    """What a table's cells share, in words."""
    minutes = shared.get("budget_minutes")
    length = f"{shared['epochs']} epochs" if minutes is None else f"{minutes:g} minutes a cell"
    adam = ", ".join(f"{value:g}" for value in shared["adam"])
    return (
        f"{length} in batches of {shared['batch_size']}, learning rate {shared['lr']:g} ({shared['schedule']}), "
        f"Adam {adam}, {shared['precision']}"
    )


def conditions(shared, rows):
    """How the cells of a table came about, line by line."""
    first = f"{schedule(shared['continues'])}; then " if "continues" in shared else ""
    data = "all training images" if shared["train"] is None else f"the first {shared['train']:,} training images"
    yield f"Training: {first}{schedule(shared)}; {data}, seed {shared['seed']}, gradient {shared['gradient']}"
    yield f"NLL from {shared['num_samples']:,} samples"
    yield f"Commit: {shared['commit']}" + "".join(
        f"; {records.name(records.asked(record))} begun at {record['begun_at_commit']}"
        for record in rows if "begun_at_commit" in record
    )  # fmt: skip
    if "continues" in shared:
        yield f"Commit of the first stages: {counted(record['continued']['commit'] for record in rows)}"
    yield f"Processor: {counted(record['processor'] for record in rows)}"
    yield f"Threads and path: {counted('{threads}, {path}'.format(**record) for record in rows)}"
    yield f"Versions: {counted(', '.join(f'{k} {v}' for k, v in record['versions'].items()) for record in rows)}"


def section(shared, by_cell, found):
    """One table beside the published one, and how it came about."""
    letter, dataset = shared["table"], shared["dataset"]
    columns, fill, papers = LAYOUT[letter]
    theirs = papers.get(dataset, {})
    cells = [
        cell for cell in tables.TABLES[letter.lower()]
        if cell.objective != "VAE" or cell.continues or shared["gradient"] == "total" or number_of(cell) in by_cell
    ]  # fmt: skip
    rows, missing = [], []
    for cell in cells:
        record = by_cell.get(number_of(cell))
        if record is None:
            missing.append(str(cell))
            rows.append([str(cell), "*not run*", *[None] * (len(columns) + len(COSTS) - 1)])
        else:
            rows.append([str(cell), *fill(cell, record, theirs, found), *costs(record)])
    ours = [by_cell[number_of(cell)] for cell in cells if number_of(cell) in by_cell]
    length = schedule(shared.get("continues", shared)).split(",")[0]
    own = f"seed {shared['seed']}, {shared['gradient']} gradients, commit {shared['commit'][:7]}"
    said = [f"Not run: {'; '.join(missing)}"] if missing else ["Every cell was run"]
    if dataset == "omniglot28":
        said.append("The split of the drawings is a random one, and not the paper's: no difference is evidence")
    if not theirs:
        said.append("Nothing was published on these data")
    said += [*ORDERINGS[letter](by_cell, theirs), *conditions(shared, ours)]
    whole = {key: value for key, value in records.asked(ours[0]).items() if key not in tables.SELECTORS}
    commands = [tables.command_of(whole | {"gradient": shared["gradient"]}), *(record["command"] for record in ours)]
    curves = f"![{', '.join(FIGURES)} along the training]({picture(shared)})"
    return [
        f"### {DATA.get(dataset, dataset)}: {length}, {own}",
        table(["cell", *columns, *COSTS], rows),
        "\n".join(f"* {line}." for line in said),
        *([curves, CURVES.format(**ours[0]["curve"])] if letter == "C" else []),
        "The whole table, and its cells one by one:",
        "\n".join(["```text", *map(wrapped, commands), "```"]),
    ]


def wrapped(command):
    """A command over as many lines as a page is wide."""
    return " \\\n    ".join(textwrap.wrap(command, 74, break_long_words=False, break_on_hyphens=False))


ORDERINGS = {"A": orderings_a, "B": orderings_b, "C": orderings_c}


def page(found):
    """The page, as text, of all records."""
    known = {(cell.table, number_of(cell)) for cells in tables.TABLES.values() for cell in cells}
    if unknown := [records.name(records.asked(r)) for r in found if (r["table"], number_of(r)) not in known]:
        raise ValueError(f"the cells of {', '.join(unknown)} stand in no table: move their records away")
    named = {records.name(records.asked(record)): record for record in found}
    blocks = [HEAD.strip()]
    for letter, title in TITLES.items():
        groups = grouped(record for record in found if record["table"] == letter)
        blocks += [f"## {title}", NOTES[letter]]
        blocks += [block for group in groups for block in section(*group, named)]
        for dataset in sorted(LAYOUT[letter][2].keys() - {shared["dataset"] for shared, _ in groups}):
            blocks.append(
                f"On {DATA[dataset]} *not run*; `python examples/tables.py {letter.lower()} --data {dataset} --paper` "
                "trains it."
            )
    return "\n\n".join(blocks) + "\n"


def picture(shared):
    """The file of a table's curves."""
    return f"curves-{shared['dataset']}-{records.digest(shared)}.png"


def draw(by_cell, path):
    """Table C's figures along the training."""
    figure = charts.new_figure(10.8, 3.4)
    cells = [(cell, by_cell[number_of(cell)]) for cell in tables.TABLES["c"] if number_of(cell) in by_cell]
    for i, title in enumerate(FIGURES):
        axes = charts.dress(figure.add_subplot(1, 3, i + 1), title=title, x="epoch", y="nats" if i == 0 else "")
        for (cell, record), colour in zip(cells, charts.class_colours(len(cells)), strict=True):
            points = record["curve"]["points"]
            values = [(p["iwae_64"], p["log_p"], p["iwae_64"] - p["log_p"])[i] for p in points]
            axes.plot([p["epoch"] for p in points], values, color=colour, label=cell.stages, linewidth=1.4)
    charts.add_legend(axes, beside=True)
    return images.save(figure, path)


def main():
    options = head.options(
        __doc__,
        records=(Path("docs/results"), "folder of the records"),
        page=(Path("docs/results/tables.md"), "what is written; the curves go beside it"),
    )
    found = records.read(options.records)
    runs.write_text(options.page, page(found))
    for old in options.page.parent.glob("curves-*.png"):
        old.unlink()
    for shared, by_cell in grouped(record for record in found if record["table"] == "C"):
        draw(by_cell, options.page.parent / picture(shared))
    print(f"{options.page}: {len(found)} records")


if __name__ == "__main__":
    main()
