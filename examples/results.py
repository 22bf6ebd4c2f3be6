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
from cells import BOUNDS, SELECTORS, TABLES

from pyrovae import runs
from pyrovae.plots import charts, images

TITLES = {
    "A": "Table A: likelihoods and active units",
    "B": "Table B: two stages",
    "C": "Table C: 64 samples, spent in several ways",
    "D": "Beyond the tables: other gradients, priors and posteriors",
}
DATA = {"mnist": "MNIST", "omniglot28": "OMNIGLOT", "digits": "Embedded digits"}
OF_A_CELL = ("layers", "objective", "particles", "groups", "gradient", "beta", "continues", "variant", "growth")
UNSTABLE = 2.0  # nats
FEW = 10  # lines with a colour each
FIGURES = {"IWAE-64": "iwae_64", "log p-hat": "log_p", "-KL": "minus_kl"}
KEPT = "\N{NO-BREAK SPACE}"
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
    beyond = ("gradient", "variant", "growth") if values["table"] == "D" else ()
    return tuple(values.get(key) for key in ("layers", "objective", "groups", "particles", "beta", *beyond))


def common(record):
    """What the cells of one table share."""
    asked, first = records.asked(record), record.get("continues")
    shared = {key: value for key, value in asked.items() if key not in OF_A_CELL}
    if record["table"] == "D":  # whose minutes are compared
        return shared | {key: record.get(key) for key in ("commit", "processor", "sharing")}
    gradients = {record["gradient"], (first or record)["gradient"]}
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


def table(columns, *rows):
    """A table in Markdown; None is a dash, and a cell of a row breaks nowhere but after commas."""
    shown = [["–" if cell is None else str(cell).replace(" ", KEPT) for cell in row] for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *shown)]
    return "\n".join(lines).replace("," + KEPT, ", ")


def against(ours, theirs):
    """Our figure, the published one, and the difference."""
    return [f"{ours:.2f}", *(("–", "–") if theirs is None else (f"{theirs:.2f}", f"{ours - theirs:+.2f}"))]


def active(record, how="at_one_draw"):
    return "+".join(str(units[how]) for units in record["active_units"].values())


def costs(record):
    heavy = record.get("unreliable")
    minutes = (f"{record[key]:.{0 if record[key] >= 10 else 1}f}" for key in ("minutes", "cpu_minutes"))
    return [None if heavy is None else f"{heavy:.0%}", record["epochs"], *minutes]


COSTS = ["k > 0.7", "epochs", "min", "CPU min"]  # k: Pareto's


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


def rows_d(cell, record, theirs, _):
    ours, *rest = against(record["nll"], best(theirs, cell.layers))
    return [f"{ours} ± {record['nll_std_error']:.1g}", *rest, f"{record['minus_kl']:.2f}", active(record)]


def best(theirs, layers):
    """The best published NLL of so many layers, or None."""
    return min((nll for (number, *_), (nll, _) in theirs.items() if number == layers), default=None)


BEYOND = ["paper", "difference"]
LAYOUT = {  # columns, what fills them, what they stand beside
    "A": (["NLL", *BEYOND, "active units", "averaged", "paper"], rows_a, published.IMPORTANCE_WEIGHTED),
    "B": (["first stage", "NLL", *BEYOND, "active units", "paper"], rows_b, published.SECOND_STAGE),
    "C": ([c for name in FIGURES for c in (name, *BEYOND)] + ["active units"], rows_c, published.TIGHTER),
    "D": (["NLL", "best paper", "difference", "-KL", "active units"], rows_d, published.IMPORTANCE_WEIGHTED),
}
CURVES = "The curves are of the first {images} test images, log p-hat in them from {samples:,} samples{besides}."
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
    "D": (
        "The networks of table A, and its bounds, with what they have in the papers replaced: the gradient by the "
        "doubly reparameterised one (dreg) or by sticking the landing (stl), the number of particles by one that "
        "grows (1 to 20 is 1 in 6 of 20 parts of the epochs, 5 in 11, 20 in 3; 1 to 50 is 1 in 8 of 19, 5 in 8, 20 in"
        " 2, 50 in 1), the prior by a VampPrior of 100 components (vamp), the posterior by one of full covariance "
        "(full), four affine couplings (flow) or four inverse autoregressive steps (iaf), the guide of two layers by "
        "a ladder. Best paper: the best published cell of table A of as many layers. What a cell does not name is as "
        "in table A."
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
        "Two layers are better than one": [((2, *bound), (1, *bound)) for bound in BOUNDS],
        "IWAE has more active units in the first layer with more particles": rising,
    }
    for claim, pairs in claims.items():
        value = first_layer if "active" in claim else lambda record: -record["nll"]
        known = [(a, b) for a, b in pairs if a in of and b in of]
        wrong = [f"{a[1]} k = {a[2]}, {layers_of(a[0])}" for a, b in known if not value(of[a]) > value(of[b])]
        if known:
            yield f"{claim}: {len(known) - len(wrong)} of {len(known)}" + (f"; not {'; '.join(wrong)}" if wrong else "")


def orderings_b(*_):
    return ()


def orderings_c(by_cell, theirs):
    """The cells from the best to the worst by each figure, here and as published."""
    known = {number: cell.stages for cell in TABLES["c"] if (number := number_of(cell)) in by_cell}
    for i, (figure, name) in enumerate(FIGURES.items()):
        ours = sorted(known, key=lambda number: -by_cell[number][name])
        yield f"{figure}, best first: {'; '.join(known[number] for number in ours)}"
        if theirs:
            papers = sorted(known, key=lambda number: -theirs[number[1:]][i][0])
            yield f"{figure} as published: {'; '.join(known[number] for number in papers)}"


def orderings_d(by_cell, theirs):
    """What is better than the papers' best of as many layers, and at what cost; what is the best here."""
    for layers in (1, 2):
        ours = [(by_cell[n], cell) for cell in TABLES["d"] if (n := number_of(cell)) in by_cell and n[0] == layers]
        if not ours:
            continue
        ours.sort(key=lambda pair: pair[0]["nll"])
        said = [f"{cell.stages}: {record['nll']:.2f} in {record['minutes']:.1f} minutes" for record, cell in ours]
        layer = layers_of(layers)
        yield f"The best of {layer}: {said[0]}"
        if (known := best(theirs, layers)) is not None:
            better = [line for line, (record, _) in zip(said, ours, strict=True) if record["nll"] < known]
            yield f"Better than the best published of {layer}, {known:.2f}: {'; '.join(better) or 'none'}"


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
    gradient = f", gradient {shared['gradient']}" if "gradient" in shared else ""
    yield f"Training: {first}{schedule(shared)}; {data}, seed {shared['seed']}{gradient}"
    yield f"NLL from {shared['num_samples']:,} samples"
    yield f"Commit: {shared['commit']}" + "".join(
        f"; {records.name(records.asked(record))} begun at {record['begun_at_commit']}"
        for record in rows if "begun_at_commit" in record
    )  # fmt: skip
    if "continues" in shared:
        yield f"Commit of the first stages: {counted(record['continued']['commit'] for record in rows)}"
    yield f"Processor: {counted(record['processor'] for record in rows)}"
    if any(record.get("sharing", 1) > 1 for record in rows):
        yield f"Cells at a time on it: {counted(record.get('sharing', 1) for record in rows)}"
    yield f"Threads and path: {counted('{threads}, {path}'.format(**record) for record in rows)}"
    yield f"Versions: {counted(', '.join(f'{k} {v}' for k, v in record['versions'].items()) for record in rows)}"


def asides(cells, by_cell):
    """What is to be known of single cells."""
    for cell in cells:
        record = by_cell.get(number_of(cell), {})
        if (fell := record.get("fell", 0.0)) > UNSTABLE:
            yield f"{cell} was unstable: on the way its bound in training fell {fell:.1f} nats below its best"
        if "measured_on" in record:
            yield f"{cell} was trained on {record['processor']}, and measured on {record['measured_on']}"


def section(shared, by_cell, found):
    """One table beside the published one, and how it came about."""
    letter, dataset = shared["table"], shared["dataset"]
    columns, fill, papers = LAYOUT[letter]
    theirs = papers.get(dataset, {})
    total = shared.get("gradient", "total") == "total"
    cells = [
        cell for cell in sorted(TABLES[letter.lower()], key=lambda cell: cell.layers)
        if cell.objective != "VAE" or cell.continues or total or number_of(cell) in by_cell
    ]  # fmt: skip
    rows, missing = [], []
    for cell in cells:
        record = by_cell.get(number_of(cell))
        if record is None:
            missing.append(str(cell))
            rows.append([str(cell), "*not run*", *[None] * (len(columns) + len(COSTS) - 1)])
        else:
            rows.append([str(cell), *fill(cell, record, theirs, found), *costs(record)])
    rows.insert(0, ["cell", *columns, *COSTS])
    ours = [by_cell[number_of(cell)] for cell in cells if number_of(cell) in by_cell]
    if len({record["epochs"] for record in ours}) == 1:
        at = rows[0].index("epochs")
        rows = [row[:at] + row[at + 1 :] for row in rows]
    length = schedule(shared.get("continues", shared)).split(",")[0]
    gradients = f", {shared['gradient']} gradients" if "gradient" in shared else f", {ours[0]['processor']}"
    own = f"seed {shared['seed']}{gradients}, commit {shared['commit'][:7]}"
    said = [f"Not run: {'; '.join(missing)}"] if missing else ["Every cell was run"]
    if dataset == "omniglot28":
        said.append("The split of the drawings is a random one, and not the paper's: no difference is evidence")
    if not theirs:
        said.append("Nothing was published on these data")
    said += [*ORDERINGS[letter](by_cell, theirs), *asides(cells, by_cell)]
    whole = {key: value for key, value in records.asked(ours[0]).items() if key not in SELECTORS}
    whole |= {"gradient": shared.get("gradient")}
    commands = [tables.command_of(whole), *(record["command"] for record in ours)]
    curves = f"![{', '.join(FIGURES) if letter == 'C' else 'NLL'} along the training]({picture(shared)})"
    besides = "" if letter == "C" else ", so that they lie above the table's NLL; minutes are those of training alone"
    return [
        f"### {DATA.get(dataset, dataset)}: {length}, {own}",
        table(*rows),
        items(said),
        *([curves, CURVES.format(besides=besides, **ours[0]["curve"])] if letter in tables.CURVED else []),
        "<details><summary>How the table came about, with the command of each cell</summary>",
        items(conditions(shared, ours)),
        "\n".join(["```text", *map(wrapped, commands), "```"]),
        "</details>",
    ]


def items(lines):
    """A list in Markdown."""
    return "\n".join(f"* {line}." for line in lines)


def wrapped(command):
    """A command over as many lines as a page is wide."""
    return " \\\n    ".join(textwrap.wrap(command, 74, break_long_words=False, break_on_hyphens=False))


ORDERINGS = {"A": orderings_a, "B": orderings_b, "C": orderings_c, "D": orderings_d}


def page(found):
    """The page, as text, of all records."""
    known = {(cell.table, number_of(cell)) for cells in TABLES.values() for cell in cells}
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


def layers_of(number):
    return f"{number} layer{'s'[: number - 1]}"


def panels(cells):
    """What is drawn of a table along the training, as (title, x, what y is, cells by name), the highest line first."""
    if cells[0][0].table == "C":
        values = (lambda p: p["iwae_64"], lambda p: p["log_p"], lambda p: p["iwae_64"] - p["log_p"])
        named = {cell.stages: record for cell, record in cells}
        return [(title, "epoch", value, named) for title, value in zip(FIGURES, values, strict=True)]
    cells = sorted(cells, key=lambda cell: cell[1]["curve"]["points"][-1]["log_p"])
    if len(cells) <= FEW:
        return [("NLL", "minutes", lambda p: -p["log_p"], {str(cell): record for cell, record in cells})]
    split = {n: {cell.stages: record for cell, record in cells if cell.layers == n} for n in (1, 2)}
    return [(f"NLL, {layers_of(n)}", "minutes", lambda p: -p["log_p"], own) for n, own in split.items() if own]


def draw(by_cell, letter, path):
    """A table's figures along the training: C's three side by side; D's NLL, of many cells by layers."""
    drawn = panels([(cell, by_cell[n]) for cell in TABLES[letter.lower()] if (n := number_of(cell)) in by_cell])
    rows, columns = (1, len(drawn)) if letter == "C" else (len(drawn), 1)
    figure, colours = charts.new_figure(10.8, rows * (3.4 if letter == "C" else 4.0)), charts.class_colours(FEW)
    for i, (title, x, value, named) in enumerate(drawn):
        axes = charts.dress(figure.add_subplot(rows, columns, i + 1), title=title, x=x, y="nats" if i < rows else "")
        for j, (name, record) in enumerate(named.items()):
            points = record["curve"]["points"]
            along, style = ([point[x] for point in points], list(map(value, points))), "--" if j >= FEW else "-"
            axes.plot(*along, style, color=colours[j % FEW], label=name, linewidth=1.4, marker=".", markersize=3)
        if x == "minutes":
            axes.set_xscale("log")
            charts.plain_ticks(axes.xaxis)
        if (i + 1) % columns == 0:
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
    for shared, by_cell in grouped(record for record in found if record["table"] in tables.CURVED):
        draw(by_cell, shared["table"], options.page.parent / picture(shared))
    print(f"{options.page}: {len(found)} records")


if __name__ == "__main__":
    main()
