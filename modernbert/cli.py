"""The command line, `modernbert COMMAND`. What a command needs is imported when it runs."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modernbert.allocator import keep_freed_memory
from modernbert.benchmark.command import bench
from modernbert.console import Command, OneLineErrors, option, plain, similarity_table
from modernbert.distillation.command import distill
from modernbert.evaluation.command import evaluate
from modernbert.training.command import train

if TYPE_CHECKING:
    import numpy as np

    from modernbert.config import ModernBertConfig
    from modernbert.sentence import SentenceEncoder
    from modernbert.weights import Checkpoint

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
POSITIVE = click.IntRange(min=1)

prompt_name = option("--prompt-name", metavar="NAME", help="Prompt of the model, such as query.")
truncate_dim = option("--truncate-dim", type=POSITIVE, help="Keep that many dimensions.")
json_flag = option("--json", "as_json", is_flag=True, help="Print JSON.")


def model_options(command: Command) -> Command:
    """The options of every command that loads a model."""
    for decorate in (
        option("--local-files-only", is_flag=True, help="Use the Hub's cache, never the network."),
        option("--dtype", metavar="DTYPE", help="float32, bfloat16, ...; default: as stored."),
        option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; default: a GPU if any."),
        option("--revision", metavar="COMMIT", help="Branch, tag or commit on the Hub."),
        option("--model", metavar="MODEL", help="Hub id or folder; default: the one that ships."),
    ):
        command = decorate(command)
    return command


def _loading(options: dict[str, Any]) -> dict[str, Any]:
    """Take what `model_options` brought out of a command's options, for `from_pretrained`."""
    from modernbert.pretrained import best_device

    names = ("revision", "device", "dtype", "local_files_only")
    chosen = {"name_or_path": options.pop("model"), **{name: options.pop(name) for name in names}}
    chosen["device"] = chosen["device"] or best_device()
    return chosen


def _opened(loading: dict[str, Any]) -> "tuple[Checkpoint, dict[str, Any]]":
    """The checkpoint, and what is left for `from_checkpoint`."""
    from modernbert.weights import open_checkpoint

    names = ("revision", "local_files_only")
    where = {name: loading.pop(name) for name in names}
    return open_checkpoint(loading.pop("name_or_path"), **where), loading


def _texts(texts: Sequence[str]) -> list[str]:
    """The TEXT arguments, with "-" replaced by the lines of standard input."""
    from modernbert.tables import STANDARD, read_table

    found: list[str] = []
    for text in texts:
        if text == STANDARD:
            found += [line for block in read_table(STANDARD) for line in block.texts]
        else:
            found.append(text)
    if not found:
        raise ValueError("there is no text")
    return found


@click.group(
    cls=OneLineErrors,
    context_settings={
        "auto_envvar_prefix": "MODERNBERT",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
    epilog="Every flag is an environment variable, too: --model of `modernbert embed` is "
    "MODERNBERT_EMBED_MODEL. Errors are one line on standard error, and exit code 2.",
)
@option("--debug", is_flag=True, help="Show tracebacks and the library's log.")
@click.version_option(package_name="modernbert", allow_from_autoenv=False)
def main(debug: bool) -> None:
    """ModernBERT encoders: embed tables, compare, predict, classify, inspect."""
    keep_freed_memory()  # the process is ours


main.add_command(bench)
main.add_command(distill)
main.add_command(evaluate)
main.add_command(train)


@main.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@option(
    "--output", "-o", required=True, metavar="FILE", help=".npy, .jsonl, .parquet, or - (jsonl)."
)
@model_options
@option("--column", default="text", help="Column that holds the texts.")
@option("--keep", multiple=True, metavar="COLUMN", help="Column to keep; default: all others.")
@option("--input-format", metavar="FORMAT", help="txt, jsonl, csv, ...; default: by the suffix.")
@prompt_name
@option("--prompt", metavar="TEXT", help="Text to put before every input.")
@truncate_dim
@option("--normalize", is_flag=True, help="Scale vectors to length 1.")
@option("--precision", type=click.Choice(PRECISIONS), default="float32", help="Of the vectors.")
@option("--quantize", type=click.Choice(("int8", "fp8")), help="8-bit linear layers.")
@option("--batch-tokens", type=POSITIVE, help="Tokens in a batch; halved if memory runs out.")
@option("--truncation", type=click.Choice(("cut", "error")), default="cut", help="Of long texts.")
@option("--progress/--no-progress", default=None, help="Progress bar; default: on a terminal.")
@option("--force", is_flag=True, help="Replace the output if it exists.")
def embed(
    inputs: tuple[str, ...],
    output: str,
    column: str,
    keep: tuple[str, ...],
    input_format: str | None,
    progress: bool | None,
    force: bool,
    **options: Any,
) -> None:
    """Turn tables of texts into a table of vectors.

    INPUT is a txt file (a text per line), jsonl, csv, tsv or parquet, or - for standard input. All
    are read as one stream, in bounded memory; the order stays. The output appears once it is
    complete. npy holds the vectors alone; jsonl and parquet keep the other columns beside
    "embedding", parquet also what made the vectors, in its metadata.
    """
    from modernbert import tables, vector_files

    target = (
        "jsonl" if output == tables.STANDARD else tables.format_of(output, vector_files.WRITABLE)
    )
    vector_files.check_output(output, force)
    if keep and target == "npy":
        raise ValueError("npy holds vectors alone; write jsonl or parquet to keep columns")
    for path in inputs:
        if path != tables.STANDARD and not Path(path).exists():
            raise ValueError(f"there is no file {path}")
    readers = [
        tables.read_table(path, format=input_format, column=column, keep=keep or None)
        for path in inputs
    ]
    blocks = tables.started(block for reader in readers for block in reader)

    from modernbert.sentence import SentenceEncoder
    from modernbert.streaming import EncodeReport

    quantize = options.pop("quantize")
    encoder = SentenceEncoder.from_pretrained(**_loading(options), quantize=quantize)
    options["normalize_embeddings"] = options.pop("normalize")
    report = EncodeReport(truncated=None)
    begin = time.perf_counter()
    like = encoder.encode([], **options)
    facts = _facts(encoder, like, **options)
    with vector_files.vector_writer(
        output, target, like=like, metadata=facts, force=force
    ) as writer:
        options["show_progress_bar"] = sys.stderr.isatty() if progress is None else progress
        options["report"] = report
        for keys, vectors in tables.with_results(
            blocks, lambda texts: encoder.encode_stream(texts, **options)
        ):
            writer.write(keys, vectors)
    seconds = time.perf_counter() - begin
    click.echo(
        f"{report.texts:,} texts, {report.tokens:,} tokens in {seconds:.1f} s "
        f"({report.tokens / seconds:,.0f} tokens/s); "
        f"{report.truncated_texts:,} of them cut, {report.cut_tokens:,} tokens lost; "
        f"{like.shape[1]} x {like.dtype} per text -> {plain(output)}",
        err=True,
    )


def _facts(
    encoder: "SentenceEncoder",
    like: "np.ndarray",
    *,
    prompt_name: str | None,
    prompt: str | None,
    truncate_dim: int | None,
    precision: str,
    normalize_embeddings: bool,
    **_: Any,
) -> dict[str, str]:
    """What must be the same before vectors of two files are compared."""
    import modernbert

    checkpoint = encoder.model.checkpoint
    name = prompt_name or encoder.default_prompt_name
    if prompt is None:
        prompt = encoder.prompts[name] if name else ""
    dimensions = truncate_dim or encoder.get_embedding_dimension()
    return {
        "version": modernbert.__version__,
        "model": "" if checkpoint is None else checkpoint.name,
        "revision": "" if checkpoint is None else checkpoint.revision or "",
        "pooling": "+".join(encoder.pooling.modes),
        "prompt": prompt,
        "dimensions": str(min(dimensions, encoder.out_features)),
        "precision": precision,
        "normalized": json.dumps(normalize_embeddings),
        "similarity": encoder.similarity_fn_name,
    }


@main.command()
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@model_options
@prompt_name
@truncate_dim
@json_flag
def similarity(texts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compare each TEXT with each.

    A TEXT of - stands for the lines of standard input.
    """
    from modernbert.sentence import SentenceEncoder

    rows = _texts(texts)
    encoder = SentenceEncoder.from_pretrained(**_loading(options))
    vectors = encoder.encode(rows, **options)
    scores = encoder.similarity(vectors, vectors).tolist()
    if as_json:
        click.echo(json.dumps({"texts": rows, "similarity": scores}))
        return
    for line in similarity_table(rows, scores):
        click.echo(line)


@main.command("fill-mask")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@model_options
@option("--top-k", type=POSITIVE, default=5, help="Predictions for each mask.")
@json_flag
def fill_mask(texts: tuple[str, ...], top_k: int, as_json: bool, **options: Any) -> None:
    """Predict the masked tokens of each TEXT.

    A TEXT of - stands for the lines of standard input.
    """
    from modernbert import predict
    from modernbert.heads import ModernBertForMaskedLM
    from modernbert.tokenizer import Tokenizer

    rows = _texts(texts)
    checkpoint, loading = _opened(_loading(options))
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    model = ModernBertForMaskedLM.from_checkpoint(checkpoint, **loading)
    results = predict.fill_mask(model, tokenizer, rows, top_k=top_k)
    if as_json:
        pairs = zip(rows, results, strict=True)
        click.echo(json.dumps([{"text": text, "masks": masks} for text, masks in pairs]))
        return
    for text, masks in zip(rows, results, strict=True):
        click.echo(plain(text))
        for number, guesses in enumerate(masks, start=1):
            where = f"  mask {number}" if len(masks) > 1 else ""
            for guess in guesses:
                click.echo(f"{where}  {guess['probability']:.4f}  {plain(guess['token'])}")


@main.command()
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@model_options
@option("--pair", "pairs", multiple=True, metavar="TEXT", help="Second text, one for each TEXT.")
@json_flag
def classify(texts: tuple[str, ...], pairs: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Score the labels of each TEXT.

    A TEXT of - stands for the lines of standard input. Where the model compares two texts, as a
    reranker does, --pair gives the second of each.
    """
    from modernbert import predict
    from modernbert.config import ModernBertConfig
    from modernbert.heads import ModernBertForSequenceClassification
    from modernbert.tokenizer import Tokenizer

    rows = _texts(texts)
    if pairs and len(pairs) != len(rows):
        raise ValueError(f"there are {len(rows)} texts and {len(pairs)} --pair; give one for each")
    checkpoint, loading = _opened(_loading(options))
    config = ModernBertConfig.from_dict(checkpoint.config, source=checkpoint.name)
    made_for = str(config.architectures[0]) if config.architectures else "a base model"
    if "classifier.weight" not in checkpoint.tensors or "ForSequence" not in made_for:
        raise ValueError(
            f"{checkpoint.name} is {made_for}, not a classifier of texts; choose one with --model"
        )
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    model = ModernBertForSequenceClassification.from_checkpoint(checkpoint, **loading)
    results = predict.classify(model, tokenizer, rows, list(pairs) or None)
    if as_json:
        both = zip(rows, results, strict=True)
        click.echo(json.dumps([{"text": text, "scores": scores} for text, scores in both]))
        return
    for text, scores in zip(rows, results, strict=True):
        click.echo(plain(text))
        for score in scores:
            click.echo(f"  {score['score']:.4f}  {plain(score['label'])}")


@main.command()
@click.argument("model", required=False)
@option("--revision", metavar="COMMIT", help="Branch, tag or commit on the Hub.")
@option("--local-files-only", is_flag=True, help="Use the Hub's cache, never the network.")
@json_flag
def info(model: str | None, revision: str | None, local_files_only: bool, as_json: bool) -> None:
    """Show parameters, memory and arithmetic of MODEL.

    All from its config alone. MODEL is a folder, a config.json, a Hub id, or an official name,
    which needs no network; without it, the model that ships.
    """
    from modernbert.accounting import account
    from modernbert.weights import EMBEDDED_NAME

    config = _config(model, revision=revision, local_files_only=local_files_only)
    figures = account(config)
    if as_json:
        click.echo(json.dumps(figures))
        return
    layers = figures["layers"]
    click.echo(f"{plain(model or EMBEDDED_NAME)}: {plain(figures['architecture'])}")
    click.echo(
        f"{layers['all']} layers ({layers['global']} global, {layers['local']} local within "
        f"{config.sliding_window} tokens to each side), hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads, mlp {config.intermediate_size}, "
        f"vocabulary {config.vocab_size:,}"
    )
    click.echo("\nparameters")
    for part, count in figures["parameters"].items():
        click.echo(f"  {part:12}{count:16,}")
    click.echo("\nmemory of the weights")
    for dtype, size in figures["bytes"].items():
        click.echo(f"  {dtype:12}{size / 2**20:12,.1f} MiB")
    click.echo("\nMFLOP per token    linear    global     local     total")
    for length, flops in figures["flops_per_token"].items():
        numbers = (flops[n] for n in ("linear", "global_attention", "local_attention", "total"))
        click.echo(f"  at {length:>5} tokens" + "".join(f"{n / 1e6:10.1f}" for n in numbers))
    if figures["flops_per_predicted_token"]:
        extra = figures["flops_per_predicted_token"] / 1e6
        click.echo(f"  and {extra:.1f} for each token that is predicted")


def _config(model: str | None, **where: Any) -> "ModernBertConfig":
    """The config of an official name, a config.json, a folder or a Hub id; None is what ships."""
    from modernbert.config import ModernBertConfig
    from modernbert.weights import OFFICIAL, open_folder

    if model in OFFICIAL and where["revision"] is None and not Path(model).exists():
        sizes = {**OFFICIAL[model], "architectures": ["ModernBertForMaskedLM"]}
        return ModernBertConfig.from_dict(sizes, source=model)
    file = Path(model) if model is not None and Path(model).is_file() else None
    name = file.name if file else "config.json"
    folder = open_folder(file.parent if file else model, **where)
    raw = folder.read_json(name)
    if not isinstance(raw, dict):
        raise ValueError(f"{folder.name} holds no {name} with a model's config")
    return ModernBertConfig.from_dict(raw, source=str(folder.folder / name))


@main.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Check this machine and every backend on it.

    Each usable attention backend is compared with float64; its error may be twice that of plain
    PyTorch. Exit code 1 when one fails.
    """
    from modernbert import doctor, kernels

    for what, how in doctor.machine():
        click.echo(f"{what:16} {plain(how)}")
    click.echo("\nattention backends")
    for device in doctor.devices():
        for status in kernels.available_backends(device):
            usable = "usable" if status.usable else "not usable"
            click.echo(f"  {device!s:6} {status.name:12} {usable}: {plain(status.reason)}")
    click.echo("\nlargest error against float64, and what it may be")
    failed = 0
    for check in doctor.self_check():
        failed += not check.passed
        click.echo(
            f"  {'ok  ' if check.passed else 'FAIL'} {check.device:6} {check.dtype:9} "
            f"{check.backend:12} {check.error:9.2e} {check.bound:9.2e}  {plain(check.result)}"
        )
    click.echo(f"\n{failed} checks failed" if failed else "\nall checks passed")
    ctx.exit(1 if failed else 0)


@main.command()
@click.argument("source")
@click.argument("folder")
@option(
    "--allow-pickle", is_flag=True, help="Yes, I trust who made SOURCE: reading it can run code."
)
@option("--config", "config_file", metavar="FILE", help="config.json, if none lies beside SOURCE.")
@option("--force", is_flag=True, help="Write into FOLDER although it exists.")
def convert(
    source: str, folder: str, allow_pickle: bool, config_file: str | None, force: bool
) -> None:
    """Rewrite the pickled checkpoint SOURCE to FOLDER.

    SOURCE is a Composer or FlexBERT .pt file, a pytorch_model.bin, or the folder of one. FOLDER
    gets safetensors, and the config in the form that all releases of transformers read.
    """
    import modernbert
    from modernbert.weights import convert_pickle

    if Path(folder).exists() and not force:
        raise ValueError(f"{folder} exists; pass --force to write into it")
    path = Path(source)
    beside = path if path.is_dir() else path.parent
    config = _config(config_file or str(beside), revision=None, local_files_only=True)
    names = tuple(str(name).replace("FlexBert", "ModernBert") for name in config.architectures)
    config = config.replace(architectures=names)
    convert_pickle(source, folder, allow_pickle=allow_pickle, config=config.to_dict())
    name = next((name for name in names if name in modernbert.__all__), "ModernBertModel")
    model = getattr(modernbert, name).from_pretrained(folder)  # an error now, not later
    count = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{plain(source)} -> {plain(folder)}, {name}, {count:,} parameters", err=True)


@main.command()
@click.argument("file", required=False)
@option("--query", "queries", multiple=True, metavar="TEXT", help="What to search for.")
def demo(file: str | None, queries: tuple[str, ...]) -> None:
    """Search and fill masks with the model that ships, without any network.

    The lines of FILE are searched (- is standard input), or some sentences that ship. Without
    --query, for what fits them: for lines of FILE itself, or for a few built-in queries.
    """
    from modernbert.demo import run

    for line in run(file, queries):
        click.echo(line)
