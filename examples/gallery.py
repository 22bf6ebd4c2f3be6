"""The gallery of the documentation: runs the examples that draw, shrinks their pictures, and writes the page.

    python examples/gallery.py [--only SECTION ...] [--again] [--output runs/gallery]

Some minutes of one core in all. A section whose pictures and record are there, made by the command that stands here, is
not made again, unless it is named or ``--again`` is given; one that was interrupted is.
"""

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import head
import records
from PIL import Image

from pyrovae import runs

PAGE = records.ROOT / "docs" / "gallery.md"
FOLDER = PAGE.with_suffix("")
LARGEST = 60_000  # bytes of a picture on the page
STEPS = ((900, 256), (900, 64), (900, 32), (700, 32), (600, 32), (500, 32), (500, 16))  # pixels across, and colours


class Section(NamedTuple):
    """One command of the page, and those of its pictures that are shown, each with a caption."""

    title: str
    command: str
    pictures: dict[str, str]

    @property
    def name(self):
        return Path(shlex.split(self.command)[1]).stem

    def files(self):
        """What the page shows of it, and the record."""
        shown = [FOLDER / f"{self.name}-{picture}.png" for picture in self.pictures]
        return [*shown, FOLDER / f"{self.name}.json"]

    def record(self):
        """What is known of the run that made the pictures; None where something is missing, or of another command."""
        *shown, path = self.files()
        if not all(file.is_file() for file in (*shown, path)):
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["command"] == self.command else None


SECTIONS = [
    Section(
        "How many latent units?",
        "python examples/latent_sizes.py",
        {
            "samples": "Data, and samples of VAEs of 2, 5, 10 and 20 units.",
            "manifold": "The plane of two units; the prior gives every cell the same mass.",
            "between_10": "Test digits, as bits, at both ends; between them what ten units decode to on the straight "
            "line from the one code to the other.",
        },
    ),
    Section(
        "What the parts of the loss do",
        "python examples/loss_parts.py",
        {
            "loss_parts": "Codes of test digits, coloured by digit; the circle holds 95% of the prior. Mind the axes: "
            "without the KL the codes scatter far beyond it."
        },
    ),
    Section(
        "Beta: rate against distortion",
        "python examples/rate_distortion.py",
        {"rate_distortion": "On test data. The least sum, the best bound on log p(x), is where beta is 1."},
    ),
    Section(
        "Autoencoders of five kinds, and PCA",
        "python examples/autoencoders.py",
        {
            "autoencoders_reconstructions": "Test data and reconstructions; above the denoising one, what it is shown.",
            "autoencoders_samples": "Decoded draws from densities that are fitted on the codes afterwards.",
        },
    ),
    Section(
        "An autoencoder that knows its data by heart",
        "python examples/overfitted.py",
        {
            "overfitted": "One unit each, thirty training images. The deep autoencoder gives those back, and is worse "
            "on test data than their mean; so is a VAE of the same networks, though less. *Line* is decoded from equal "
            "steps over the codes."
        },
    ),
    Section(
        "Digits by label",
        "python examples/conditional.py",
        {
            "samples": "Samples, a row for each label.",
            "analogies": "First a test digit, then its z under every label.",
        },
    ),
    Section(
        "Digits by attribute",
        "python examples/attributes.py",
        {"attributes": "One test digit's z. The slant rises from left to right, the stroke width from top to bottom."},
    ),
    Section(
        "VQ-VAE",
        "python examples/vqvae.py",
        {
            "reconstructions": "Test digits and their reconstructions from 4 x 4 codes.",
            "samples": "Samples from the learned prior over codes, and from the uniform one of the training.",
            "codes": "The share of each code in the training data.",
        },
    ),
    Section(
        "Why many samples, and why a Gaussian prior loses nothing",
        "python examples/why_many_samples.py",
        {
            "bounds": "The expected log of a mean of k draws of X, which is 1 or 100, rises to log E[X].",
            "ring": "A decoder makes a ring of a Gaussian.",
        },
    ),
    Section(
        "The bound against k, where log p(x) is known",
        "python examples/bound_against_k.py",
        {
            "bound_against_k": "The distance shrinks as 1/k where the weights have a finite variance, as those of the "
            "linear pair; more slowly for heavy tails, such as those of the VAE."
        },
    ),
    Section(
        "Signal and noise of the gradient",
        "python examples/signal_to_noise.py",
        {
            "signal_to_noise": "IWAE's gradient of the guide drowns as K grows, by a slope of -1/2 (Rainforth et al. "
            "2018); the doubly reparameterised one gets clearer, by +1/2 (Tucker et al. 2018), as the model's does."
        },
    ),
]

HEAD = """# Gallery

Every picture stands below the command that draws it and above what the command prints. The data are the embedded
digits, of 8 x 8 pixels; scripts that take `--data` draw the same of MNIST with `--data mnist`. The whole page, pictures
and all, is made by `python examples/gallery.py`.
"""


def shrink(source, target):
    """Write a picture that is narrow and small enough for the page: as wide and in as many colours as that allows."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    for width, colours in STEPS:
        picture.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
        picture.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(target, optimize=True)
        if target.stat().st_size <= LARGEST:
            return
    target.unlink()
    raise ValueError(f'"{source}" has more than {LARGEST:,} bytes, {width} pixels wide in {colours} colours: draw less')


def make(section, output):
    """Run the command, shrink its pictures, and write the record last."""
    *shown, path = section.files()
    path.unlink(missing_ok=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = (output / section.name).resolve()
    arguments = [sys.executable, *shlex.split(section.command)[1:], "--output", str(folder)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(arguments, cwd=records.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for picture, target in zip(section.pictures, shown, strict=True):
        shrink(folder / f"{picture}.png", target)
    runs.write_json(
        path,
        {
            "command": section.command,
            "commit": records.commit(),
            "processor": records.processor("cpu"),
            "cpu_seconds": round(after.ru_utime - before.ru_utime),
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())),
            "printed": "\n".join(line for line in done.stdout.splitlines() if str(folder) not in line),
        },
    )


def page():
    """The page, in Markdown, of the records that there are."""
    parts = [HEAD]
    for section in SECTIONS:
        record = section.record()
        parts.append(f"\n## {section.title}\n\n    {section.command}\n")
        for picture, caption in section.pictures.items():
            parts.append(f"\n![{caption}](gallery/{section.name}-{picture}.png)\n\n{caption}\n")
        cost = f"{record['cpu_seconds']} s of one core, {record['processor']}, commit {record['commit'][:8]}"
        parts.append(f"\n```text\n{record['printed']}\n```\n\n{cost}.\n")
    return "".join(parts)


def main():
    names = [section.name for section in SECTIONS]
    options = head.options(
        __doc__,
        only={"nargs": "*", "choices": names, "default": [], "help": "make these alone, whether they are there or not"},
        again=(False, "make what is there as well"),
        output=(Path("runs/gallery"), "folder of the pictures in full size"),
    )
    for section in SECTIONS:
        wanted = section.name in options.only if options.only else options.again or section.record() is None
        if wanted:
            print(section.command, flush=True)
            make(section, options.output)
    if missing := [section.name for section in SECTIONS if section.record() is None]:
        print(f"no page yet, as these are not made: {', '.join(missing)}")
        return
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{len(SECTIONS)} sections in {PAGE.relative_to(records.ROOT)}")


if __name__ == "__main__":
    main()
