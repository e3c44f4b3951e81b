"""The command line: words to jobs, one base error to one line, nothing else.

Torch is imported only by the commands that compute; `--help`, `list`, `inspect` and `--dry-run`
answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dqconvert.converter import manifest, show
from dqconvert.converter.job import Job
from dqconvert.converter.lora.words import branching, merging
from dqconvert.converter.resolve import ALL
from dqconvert.formats.targets import targets
from dqconvert.quantizers.errors import DQConvertError, UnknownName
from dqconvert.quantizers.schemes import schemes

PATH = click.Path(path_type=Path)
LEGACY = "scaled-fp8"
"""The layout that --legacy stands for."""


class DefaultGroup(click.Group):
    """A group in which words that name no command belong to `convert`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `convert` in front where the first word is no command."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version", "-h"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)


class Size(click.ParamType[tuple[int, int]]):
    """HxW in pixels."""

    name = "HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """ "512x768" to (512, 768)."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(value))
        if found is None:
            self.fail(f"'{value}' is not of the form HxW, such as 512x768", param, ctx)
        height, width = int(found[1]), int(found[2])
        if height % 8 or width % 8 or min(height, width) < 16:
            self.fail(f"'{value}': both must be multiples of 8, and at least 16", param, ctx)
        return height, width


class Smooth(click.ParamType[str]):
    """auto, off, or an exponent."""

    name = "auto|off|ALPHA"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The word, checked."""
        if value in ("auto", "off") or re.fullmatch(r"0?\.\d+|[01]|1\.0+", str(value)):
            return str(value)
        return self.fail(f"'{value}' is none of auto, off, or a number from 0 to 1", param, ctx)


class Override(click.ParamType[tuple[str, str]]):
    """REGEX=SCHEME."""

    name = "REGEX=SCHEME"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        """The two halves; the scheme must exist."""
        if isinstance(value, tuple):
            return value
        pattern, _, name = str(value).rpartition("=")
        if not pattern or not name:
            self.fail(f"'{value}' is not of the form REGEX=SCHEME", param, ctx)
        if name not in schemes():
            self.fail(str(UnknownName("scheme", name, schemes())), param, ctx)
        return pattern, name


def reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors of the user's into one line and exit 1, Ctrl-C and SIGTERM into 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return command(*args, **kwargs)
        except UnknownName as error:
            raise click.UsageError(str(error)) from error
        except DQConvertError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted; nothing was written.", err=True)
            sys.exit(130)

    return run


@click.group(
    cls=DefaultGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(manifest.version("dqconvert") or "of a source tree, not installed")
def main() -> None:
    """Quantize a diffusion transformer for the runtime you use.

    `dqconvert MODEL --scheme NAME` is short for `dqconvert convert MODEL --scheme NAME`.
    MODEL is an alias (flux1-dev, flux-digits), a Hub id, a folder, or a file.
    """


@main.command()
@click.argument("model")
@click.option("--scheme", metavar="NAME", help="See `dqconvert list schemes`.")
@click.option("--target", metavar="NAME", help="Default: the scheme's first that runs the model.")
@click.option(
    "--component",
    default="transformer",
    metavar="NAME",
    help="Part of the pipeline, or all: a whole pipeline folder, of which the scheme quantizes the "
    "transformers.",
)
@click.option(
    "--encoder-scheme",
    metavar="NAME",
    help="Of the encoders with --component all; without it they stay as they are.",
)
@click.option("--calib", type=PATH, metavar="FILE", help="Prompts, .txt or .jsonl.")
@click.option("--calib-steps", type=click.IntRange(1), metavar="N", help="Default: 12.")
@click.option("--calib-samples", type=click.IntRange(1), metavar="N", help="Use N prompts.")
@click.option("--size", type=Size(), help="Pictures to calibrate on; default: the model's own.")
@click.option("--pipeline", metavar="MODEL", help="Text encoders for a lone transformer.")
@click.option("--imatrix", type=PATH, metavar="FILE", help="llama.cpp's importance matrix.")
@click.option("-o", "--output", type=PATH, metavar="DIR", help="Default: ./MODEL-SCHEME-TARGET")
@click.option("--rank", type=int, metavar="N", help="Of the low-rank branch, a multiple of 16.")
@click.option(
    "--rounding",
    type=click.Choice(["rtn", "mse", "gptq"]),
    help="Default: the scheme's, which is gptq for most with --calib, else rtn.",
)
@click.option("--smooth", type=Smooth(), default="auto", show_default=True)
@click.option(
    "--precondition",
    type=click.Choice(["off", "auto", "fold", "center"]),
    default="off",
    show_default=True,
    help="Smooth inside the weights; needs --calib. AWQ folds in any case.",
)
@click.option(
    "--group-size", type=int, metavar="N", help="Of weight-only int4: 128 (default), 64 or 32."
)
@click.option(
    "--bits", type=click.FloatRange(1, 16), metavar="B", help="Of a weight, for gguf-auto: 4.5."
)
@click.option("--zero-points", is_flag=True, help="Weight-only int4 with zero points.")
@click.option("--keep", metavar="REGEX", help="Linears to leave unquantized, by diffusers name.")
@click.option("--override", type=Override(), multiple=True, help="Another scheme for some linears.")
@click.option("--layout", metavar="NAME", help="One of the target's; see `list layouts`.")
@click.option("--legacy", is_flag=True, help="Short for --layout scaled-fp8 (comfyui).")
@click.option("--kernel", metavar="NAME", help="What LightX2V runs the layers with.")
@click.option("--save-by-block", is_flag=True, help="A file for each block (lightx2v).")
@branching
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads; default: cores.")
@click.option("--device", default="cpu", metavar="cpu|cuda[:N]", help="For GGUF: where to round.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@reported
def convert(dry_run: bool, as_json: bool, quiet: bool, **words: Any) -> None:
    """Quantize MODEL (the default command)."""
    from dqconvert.converter.prepare import prepare

    job = _job(**words)
    if not job.scheme:
        _rewrite(job, dry_run, as_json)
        return
    if job.component == ALL:
        _convert_all(job, dry_run, as_json, quiet)
        return
    if job.encoder_scheme is not None:
        raise click.UsageError("--encoder-scheme is for --component all")
    prepared = prepare(job)
    if dry_run:
        show.plan(prepared, as_json)
        return
    show.conversion(prepared, as_json, quiet)


def _convert_all(job: Job, dry_run: bool, as_json: bool, quiet: bool) -> None:
    from dqconvert.converter import components

    whole = components.prepare_all(job)
    if dry_run:
        show.pipeline_plan(whole, as_json)
        return
    path = show.with_progress(lambda one: components.convert_all(whole, one), quiet or as_json)
    if as_json:
        show.manifest_of(path)
    elif not quiet:
        show.made(path, False)


def _job(override: Any, legacy: bool, kernel: str | None, save_by_block: bool, **words: Any) -> Job:
    """A job from the words of the command line, the short ones spelt out."""
    if legacy and words["layout"] not in (None, LEGACY):
        raise click.UsageError(f"--legacy means --layout {LEGACY}, not {words['layout']}")
    if legacy:
        words["layout"] = LEGACY
    settings = {"kernel": kernel, "save-by-block": "yes" if save_by_block else None}
    given = {name: value for name, value in settings.items() if value is not None}
    words["scheme"] = words["scheme"] or ""
    return Job(**words, overrides=tuple(override), settings=given)


def _rewrite(job: Job, dry_run: bool, as_json: bool) -> None:
    """An output of ours with LoRAs in its branches, which is all that needs no scheme."""
    if job.lora_mode != "branch":
        raise click.UsageError("Missing option '--scheme'.")
    from dqconvert.converter.lora.rewrite import plan_rewrite, rewrite

    wish = plan_rewrite(job)
    if dry_run:
        show.rewriting(wish.summary, as_json)
        return
    show.made(rewrite(wish), as_json)


@main.command("list")
@click.argument("what", type=click.Choice(["schemes", "targets", "layouts", "models"]))
@click.option("--json", "as_json", is_flag=True)
@reported
def list_(what: str, as_json: bool) -> None:
    """Print what there is: schemes, targets, their layouts, or models."""
    show.table(_rows(what), as_json)


@main.command()
@click.argument("path", type=PATH)
@click.option("--json", "as_json", is_flag=True)
@reported
def inspect(path: Path, as_json: bool) -> None:
    """Say what a checkpoint is: family, variant, dialect, formats, sizes, problems."""
    from dqconvert.converter.inspect import inspect as look

    show.inspection(look(path), as_json)


@main.command()
@click.argument("out", type=PATH)
@click.option("--against", metavar="MODEL", help="The model that it was made from.")
@click.option("--json", "as_json", is_flag=True)
@reported
def verify(out: Path, against: str | None, as_json: bool) -> None:
    """Dequantize every layer of OUT from its bytes and report its error.

    OUT may be a pipeline, of which all quantized parts are checked. Exits with 1 on a missing,
    misshapen, non-finite or mislabelled tensor.
    """
    from dqconvert.converter.verify_pipeline import verify_any as check

    verdict = check(out, against)
    show.verdict(verdict, as_json)
    sys.exit(1 if verdict.problems else 0)


@main.command()
@click.argument("out", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE")
@click.option("--overwrite", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
@reported
def dequantize(out: Path, output: Path, overwrite: bool, as_json: bool) -> None:
    """Write OUT back as a bf16 checkpoint in the naming of its source."""
    from dqconvert.converter.dequantize import dequantize as write

    show.made(write(out, output, overwrite), as_json)


@main.command()
@click.argument("out", type=PATH)
@click.option("--target", metavar="NAME", required=True, help="See `dqconvert list targets`.")
@click.option("--layout", metavar="NAME", help="One of the target's; see `list layouts`.")
@click.option("-o", "--output", type=PATH, metavar="DIR", help="Default: ./MODEL-SCHEME-TARGET")
@click.option("--dequantize-kept", is_flag=True, help="16 bit for what the target keeps so.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only.")
@reported
def transcode(as_json: bool, quiet: bool, **words: Any) -> None:
    """Write OUT in another target's layout, without quantizing again."""
    from dqconvert.converter.transcode import Transcoding
    from dqconvert.converter.transcode import transcode as write

    wish = Transcoding(**words)
    path, notes = show.with_progress(lambda listen: write(wish, listen), quiet or as_json)
    show.folder(path, notes, as_json, quiet)


@main.command()
@click.argument("model")
@click.option(
    "--component", default="transformer", metavar="NAME", help="Or transformer_2, text_encoder."
)
@click.option("--calib", type=PATH, metavar="FILE", required=True)
@click.option("--calib-steps", type=click.IntRange(1), metavar="N", help="Default: 12.")
@click.option("--calib-samples", type=click.IntRange(1), metavar="N")
@click.option("--size", type=Size())
@click.option("--pipeline", metavar="MODEL")
@click.option("--imatrix", type=PATH, metavar="FILE", help="Also as .dat or .gguf of llama.cpp.")
@merging
@click.option("-q", "--quiet", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
@reported
def calibrate(imatrix: Path | None, quiet: bool, as_json: bool, **words: Any) -> None:
    """Collect statistics only; conversions with equal prompts and settings reuse them."""
    from dqconvert.converter.statistics import calibrate as run

    job = Job(scheme="", **words)
    path = show.with_progress(lambda listen: run(job, listen, imatrix), quiet or as_json)
    show.made(path, as_json)


def _layouts() -> list[dict[str, str]]:
    """The layouts of targets that have several for a scheme, the default of a scheme first."""
    found: dict[tuple[str, str], list[str]] = {}
    for target in targets().values():
        for scheme in schemes().values():
            names = () if target.accepts(scheme) else target.layouts(scheme)
            for name in names if len(names) > 1 else ():
                found.setdefault((name, target.NAME), []).append(scheme.name)
    return [
        {"name": name, "target": target, "schemes": ", ".join(held)}
        for (name, target), held in found.items()
    ]


@main.command("rebase-lora")
@click.argument("lora", type=PATH)
@click.option("--onto", type=PATH, required=True, metavar="OUT", help="A preconditioned output.")
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE")
@click.option("--overwrite", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
@reported
def rebase_lora(lora: Path, onto: Path, output: Path, overwrite: bool, as_json: bool) -> None:
    """Rewrite LORA, of the original weights, for OUT, whose weights --precondition changed."""
    from dqconvert.converter.rebase import rebase

    show.made(rebase(lora, onto, output, overwrite), as_json)


def _rows(what: str) -> list[dict[str, str]]:
    from dqconvert.converter.families import families
    from dqconvert.converter.options import runs
    from dqconvert.converter.resolve import embedded

    if what == "schemes":
        return [
            {"name": s.name, "what": s.summary, "targets": ", ".join(s.targets)}
            for s in schemes().values()
        ]
    if what == "layouts":
        return _layouts()
    if what == "targets":
        return [
            {
                "name": t.NAME,
                "what": t.SUMMARY,
                "schemes": ", ".join(s.name for s in schemes().values() if not t.accepts(s)),
            }
            for t in targets().values()
        ]
    rows = [(name, families()["flux"], "embedded") for name in embedded()]
    rows += [(alias, one, hub) for one in families().values() for alias, hub in one.aliases.items()]
    return [
        {
            "name": name,
            "family": one.title,
            "where": hub,
            "targets": ", ".join(t.NAME for t in targets().values() if runs(t, one)),
        }
        for name, one, hub in rows
    ]


if __name__ == "__main__":
    main()
