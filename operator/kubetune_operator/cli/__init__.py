"""The command line `kubetune`.

Check, render, run and sweep over a manifest, look at the jobs of a cluster and at what they made, copy recipes.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from kubetune_operator.api.manifest import dump_manifests
from kubetune_operator.cli import cluster, lineage, live, local, recipes, sweep_command, verify
from kubetune_operator.cli.bundle import load_bundle, load_bundles
from kubetune_operator.cli.chat import chat as chat_with
from kubetune_operator.cli.estimate import estimate as estimate_memory
from kubetune_operator.cli.script import check_script
from kubetune_operator.errors import OperatorError
from kubetune_operator.render.objects import render_all
from kubetune_operator.settings import load_settings

app = typer.Typer(
    help="Fine-tune language models on Kubernetes with plain PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(
    help="List the recipes and configs that come with kubetune, and copy one to change it.", no_args_is_help=True
)
app.add_typer(recipes_app, name="recipes")

File = Annotated[Path, typer.Argument(metavar="FILE", help="Manifest of a job; - reads standard input.")]
Name = Annotated[
    str | None, typer.Option("--name", help="Which job (NAME or KIND/NAME), where the file holds several.")
]
S3Endpoint = Annotated[
    str | None,
    typer.Option(
        "--s3-endpoint", metavar="URL", help="Where storage.s3 is reached from this machine, if not at its endpoint."
    ),
]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; default: the kubeconfig's.")]


@app.command()
def validate(
    file: File,
    name: Name = None,
    live_too: Annotated[
        bool, typer.Option("--live", help="Also ask the cluster and the storage: Secrets, bucket, model, data.")
    ] = False,
    s3_endpoint: S3Endpoint = None,
) -> None:
    """Check a manifest as the API server and the operator would, without a cluster."""
    one = [load_bundle(file, name=name, s3_endpoint=s3_endpoint)] if name else None
    for bundle in one or load_bundles(file, s3_endpoint=s3_endpoint):
        local.check_batch(bundle)
        check_script(bundle)
        for note in bundle.notes():
            typer.echo(f"note: {note}", err=True)
        if live_too:
            live.check(bundle, say=typer.echo)
        typer.echo(f"{bundle.title} is valid")


@app.command()
def estimate(
    file: File,
    name: Name = None,
    device_memory: Annotated[
        str | None, typer.Option("--device-memory", metavar="SIZE", help="What a device has, for example 24GiB.")
    ] = None,
    suggest: Annotated[bool, typer.Option("--suggest", help="Where it does not fit, list what needs less.")] = False,
    s3_endpoint: S3Endpoint = None,
) -> None:
    """Print the memory that training needs per device, by part. Of the model, only config.json is read.

    Exit code 1: it does not fit a device of the given size.
    """
    bundle = load_bundle(file, name=name, s3_endpoint=s3_endpoint)
    raise typer.Exit(estimate_memory(bundle, device_memory=device_memory, suggest=suggest))


@app.command()
def render(file: File, name: Name = None) -> None:
    """Print every object that the operator would create. Its settings come from KUBETUNE_OPERATOR_… variables."""
    bundles = [load_bundle(file, name=name)] if name else load_bundles(file)
    settings = load_settings(os.environ)
    typer.echo(dump_manifests([item for bundle in bundles for item in render_all(bundle.job, settings)]), nl=False)


@app.command()
def run(
    file: File,
    name: Name = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what an earlier run of this manifest left, and start anew.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the trainer's own log.")] = False,
    s3_endpoint: S3Endpoint = None,
) -> None:
    """Run a manifest on this machine, without a cluster: the same config and recipes, processes instead of pods.

    Secrets and ConfigMaps may stand in the same file. Ctrl-C writes a checkpoint; the same command goes on from it.
    """
    bundle = load_bundle(file, name=name, s3_endpoint=s3_endpoint)
    raise typer.Exit(local.run(bundle, fresh=fresh, verbose=verbose))


@app.command()
def get(
    job: Annotated[str | None, typer.Argument(metavar="[NAME|KIND/NAME]", help="Show this job in full.")] = None,
    namespace: Namespace = None,
) -> None:
    """List the jobs of a namespace, or show one."""
    cluster.get(job, namespace=namespace)


@app.command()
def logs(
    job: Annotated[str, typer.Argument(metavar="NAME|KIND/NAME", help="The job.")],
    namespace: Namespace = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay and print what comes.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Print the lines as the trainer wrote them.")] = False,
) -> None:
    """Print the log of a job's first pod: the one that does the work, or prepares it before there is one."""
    cluster.logs(job, namespace=namespace, follow=follow, raw=raw)


@app.command()
def sweep(  # noqa: PLR0917 (options of a command line)
    file: File,
    settings: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="FIELD=VALUE,…", help="A field of the spec and its values, for example lora.rank=8,16."
        ),
    ],
    name: Name = None,
    namespace: Namespace = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="validationLoss, loss, tokensPerSecond or peakMemoryBytes of a job's progress."),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, metavar="N", help="At most N unfinished jobs at once.")
    ] = None,
    here: Annotated[bool, typer.Option("--local", help="Run the jobs on this machine, one after the other.")] = False,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where table and plot go.")] = Path(),
) -> None:
    """Make a job for every combination of values, follow them, and rank them by a metric.

    Writes NAME-sweep.md and NAME-sweep.svg. Ctrl-C ends the following, not the jobs; the same command goes on.
    """
    raise typer.Exit(
        sweep_command.sweep(
            file,
            settings=settings,
            name=name,
            namespace=namespace,
            metric=metric,
            parallel=parallel,
            here=here,
            folder=output,
        )
    )


@app.command("lineage")
def show_lineage(
    target: Annotated[
        str, typer.Argument(metavar="NAME|FOLDER|URI", help="A job (NAME or KIND/NAME), or what one wrote.")
    ],
    namespace: Namespace = None,
    s3_endpoint: S3Endpoint = None,
) -> None:
    """Print where a model comes from: models, data and jobs, with their commits and digests."""
    lineage.show(target, namespace=namespace, s3_endpoint=s3_endpoint)


@app.command("verify")
def verify_folder(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An output of a job, downloaded.")],
    digest: Annotated[
        str | None, typer.Option("--digest", metavar="sha256:…", help="What it has to be; default: its lineage.json.")
    ] = None,
) -> None:
    """Compare a folder with the digest that the job reported for it."""
    typer.echo(verify.verify(folder, digest=digest))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def chat(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with a model.")],
) -> None:
    """Talk to a model; further options are those of the recipe `generate`."""
    chat_with(model, options=context.args)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List recipes and configs."""
    for entry in recipes.listed():
        typer.echo(f"{entry.name:32} {entry.summary}")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="A name that `kubetune recipes ls` prints.")],
    destination: Annotated[Path, typer.Argument(help="File or folder to write to; nothing is overwritten.")],
) -> None:
    """Copy a recipe or a config to change it."""
    typer.echo(recipes.copy(name, destination=destination))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 1 what was asked for cannot be done, 2 usage; `kubetune run` exits as the trainer did.
    """
    try:
        app(arguments)
    except OperatorError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        sys.exit(1)
    except BrokenPipeError:
        # The reader, `head` for instance, has seen enough. Nothing must be flushed into the closed pipe on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)
