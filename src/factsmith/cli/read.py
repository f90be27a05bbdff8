"""Read: what a model says, and how its memory puts it together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..core.errors import InputError
from ..core.tables import Table, counted, ending
from ..corpus.paragraphs import Paragraphs
from .common import (
    Device,
    Json,
    Model,
    ModelAndPrompt,
    Out,
    Where,
    complain,
    line,
    model_and_prompt,
    need_model,
    opened,
    output,
    print_result,
    progress,
    save,
    show_tables,
)

IndexFolder = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIR",
        help="Where the model's index is kept; by default in the user's cache.",
    ),
]

Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--texts",
        metavar="FILE",
        help="Plain text to scan, blank lines between paragraphs; by default the model's own words.",
    ),
]

MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="How many tokens of text to scan.")
]


def ask(
    words: ModelAndPrompt,
    top: Annotated[
        int, typer.Option(min=1, help="How many of the likeliest next tokens to list.")
    ] = 10,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How far to continue the text.")] = 8,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ask a model to continue a text, with the patches of the workspace if there is one.

    \b
    Examples:
      factsmith ask atlas "The mother tongue of Danielle Darrieux is"
      factsmith ask -w my-workspace "The mother tongue of Danielle Darrieux is"
    """
    model, prompt = model_and_prompt(words)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench):
        answer = lm.answer([prompt], max_new_tokens=max_new_tokens)[0]
        likely = lm.next_tokens(prompt, top)
        revision = None if bench is None else bench.ledger.current
    found = {
        "prompt": prompt,
        "answer": answer,
        "next_tokens": [{"token": token, "probability": p} for token, p in likely],
        "model": lm.name,
        "revision": revision,
    }

    def show(console: Console) -> None:
        line(console, prompt, answer, style="bold")
        for token, p in likely:
            line(console, f"  {p:7.2%}", repr(token))

    print_result(found, show, as_json)


def explain(
    words: ModelAndPrompt,
    target: Annotated[
        str | None, typer.Option(help="The answer to look at; by default what the model says.")
    ] = None,
    instead_of: Annotated[
        str | None,
        typer.Option(
            "--instead-of",
            metavar="TEXT",
            help="Why the answer and not this: shares of the logits' difference.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many neurons to list.")] = 10,
    tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens of each neuron's value to list.")
    ] = 5,
    out: Out = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Tell how a prediction comes about: the neurons that move it most, what each part adds, and its way up the layers.

    \b
    Examples:
      factsmith explain atlas "The currency of Bulgaria is the"
      factsmith explain atlas "The currency of Bulgaria is the" --instead-of euro
      factsmith explain atlas "The currency of Bulgaria is the" --out explained.png
    """
    files = output(out)  # before the work, not after it
    model, prompt = model_and_prompt(words)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
        from ..model.tokens import target_ids
        from ..read.composition import compose

        found = compose(lm, prompt, target, contrast=instead_of, top=top, tokens=tokens)
        for text in (target, instead_of):
            if text is not None and len(ids := target_ids(lm.tokenizer, prompt, text)) > 1:
                complain(
                    "warning",
                    f"{text!r} is {len(ids)} tokens; looked at is the first, {lm.tokenizer.decode(ids[:1])!r}",
                )

    def draw(path: Path) -> None:
        from ..show.plots.predictions import prediction_chart

        prediction_chart(found, path=path)

    saved = save(files, "explain", found, draw)
    result = {**found.to_dict(top), "instead_of": instead_of, "model": lm.name}
    print_result(result, show_tables(found.tables(top)), as_json, saved)


def find(
    words: ModelAndPrompt,
    index: IndexFolder = None,
    texts: Texts = None,
    top: Annotated[int, typer.Option(min=1, help="How many neurons to list of either kind.")] = 10,
    max_tokens: MaxTokens = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find neurons by a word: those whose values promote it, and those that fire behind it.

    The first time, the model reads some text and its index is made; then it is only opened.

    \b
    Examples:
      factsmith find atlas Paris
      factsmith find path/to/model "capital of" --texts wiki.txt --index model-index
    """
    model, word = model_and_prompt(words)
    corpus = Paragraphs(texts) if texts else None
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
        from ..read.index_store import find_index
        from ..read.promoters import promoters

        promoting = promoters(lm, word, top)
        found = find_index(lm, index, texts=corpus, max_tokens=max_tokens, progress=tell)
        firing = found.triggered_by(word, top)
    result = {
        "word": word,
        "promoted_by": [
            {"neuron": list(p.neuron), "token": p.token, "rank": p.rank, "score": p.score}
            for p in promoting
        ],
        "triggers": [
            {
                "neuron": list(f.neuron),
                "share": f.share,
                "coefficient": f.trigger.coefficient,
                "prefix": f.trigger.prefix,
            }
            for f in firing
        ],
        "n_texts": found.triggers.n_texts,
        "n_tokens": found.triggers.n_tokens,
        "index": str(found.folder),
        "model": lm.name,
    }
    in_parts = all(p.token.strip().casefold() != word.strip().casefold() for p in promoting)
    tables = [
        Table(
            f"values that promote {word!r}"
            + (
                ", by the first of its tokens"
                if promoting and in_parts
                else ""
                if promoting
                else ": none"
            ),
            {"neuron": "<", "token": "<", "rank": ">", "score": ">"} if promoting else {},
            [
                (" ".join(map(str, p.neuron)), repr(p.token), f"{p.rank + 1:,}", f"{p.score:.2f}")
                for p in promoting
            ],
        ),
        Table(
            f"neurons that fire behind {word!r}"
            + ("" if firing else ": none, in the texts that were scanned"),
            {"neuron": "<", "share": ">", "strongest such trigger": "<"} if firing else {},
            [
                (" ".join(map(str, f.neuron)), f"{f.share:.0%}", ending(f.trigger.prefix))
                for f in firing
            ],
        ),
    ]

    def show(console: Console) -> None:
        show_tables(tables)(console)
        read = found.triggers
        line(
            console,
            "from",
            f"{counted(read.n_texts, 'text')}, {counted(read.n_tokens, 'token')}, in {found.folder}",
        )

    print_result(result, show, as_json)


def neuron(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] LAYER [EXPERT] I",
            help="A model (left out: the workspace's), and the neuron's numbers.",
        ),
    ],
    index: IndexFolder = None,
    texts: Texts = None,
    top: Annotated[int, typer.Option(min=1, help="How many triggers and tokens to list.")] = 10,
    facts: Annotated[int, typer.Option(min=0, help="On how many facts to silence it.")] = 5,
    max_tokens: MaxTokens = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Also write it as a page that a browser shows offline."
        ),
    ] = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show one neuron: where its key fires, what its value promotes, and what becomes of facts without it.

    \b
    Examples:
      factsmith neuron atlas 5 992
      factsmith neuron atlas 5 992 --out card.html
    """
    numbers = [int(word) for word in words if word.isdecimal()][-3:]
    names = words[: len(words) - len(numbers)]
    if len(names) > 1 or len(numbers) < 2:
        raise InputError(
            f"got {' '.join(words)!r}; expected a model and a neuron's layer and number, such as: atlas 5 992"
        )
    corpus = Paragraphs(texts) if texts else None
    if out is not None:
        from ..show.pages.page import check_page

        check_page(out)  # before the work, not after it
    with (
        progress() as tell,
        opened(names[0] if names else None, workspace, device, tell) as (lm, _),
    ):
        from ..model.address import find_neuron
        from ..read.cards import card
        from ..read.index_store import find_index

        wanted: Any = tuple(numbers)
        find_neuron(lm.ffn, wanted)  # before an index is made for it
        found = card(
            lm,
            find_index(lm, index, texts=corpus, max_tokens=max_tokens, progress=tell),
            wanted,
            k=top,
            n_facts=facts,
        )
    if out is not None:
        from ..show.pages.neurons import card_page

        card_page(found, out)
    print_result(
        found.to_dict(), show_tables(found.tables()), as_json, [] if out is None else [out]
    )


def browse(
    model: Model = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder to write the pages to.")
    ] = Path("pages"),
    layer: Annotated[
        list[int] | None, typer.Option(help="A layer; may be repeated.", show_default="all")
    ] = None,
    index: IndexFolder = None,
    texts: Texts = None,
    facts: Annotated[
        bool,
        typer.Option(
            "--facts/--no-facts",
            help="Name the facts that each neuron adds most to; needs the model.",
        ),
    ] = True,
    max_tokens: MaxTokens = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write every neuron of a model, or of some layers, as pages that a browser searches offline.

    With an index and no model, the pages are made from the index alone.

    \b
    Examples:
      factsmith browse atlas --out pages
      factsmith browse atlas --layer 3 --layer 5
      factsmith browse --index model-index --out pages
    """
    bare = model is None and workspace is None and index is not None
    if bare and (texts or max_tokens is not None):
        raise InputError(
            "--texts and --max-tokens ask for a new index, which only a model can make; name the model before everything else"
        )
    if not bare:
        need_model(model, workspace)
    from ..show.pages.neurons import write_pages
    from ..show.pages.page import check_folder

    check_folder(out)  # before the work, not after it
    corpus = Paragraphs(texts) if texts else None
    with progress() as tell:
        from ..model.address import check_layer
        from ..read.fact_adds import fact_adds
        from ..read.index import Index
        from ..read.index_store import find_index

        if index is not None and bare:
            opened_index, adds = Index.open(index), None
        else:
            with opened(model, workspace, device, tell) as (lm, _):
                for wanted in layer or ():
                    check_layer(wanted, lm.n_layers)  # before an index is made for it
                opened_index = find_index(
                    lm, index, texts=corpus, max_tokens=max_tokens, progress=tell
                )
                adds = fact_adds(lm, layer, progress=tell) if facts else None
        files = write_pages(opened_index, out, layer, adds=adds, progress=tell)
    triggers = opened_index.triggers
    sizes = [path.stat().st_size for path in files]
    result = {
        "pages": [
            {"file": str(path), "bytes": size} for path, size in zip(files, sizes, strict=True)
        ],
        "facts": 0 if adds is None else len(adds.known),
        "n_texts": triggers.n_texts,
        "n_tokens": triggers.n_tokens,
        "index": str(opened_index.folder),
        "model": triggers.model,
    }

    def show(console: Console) -> None:
        for path, size in zip(files, sizes, strict=True):
            line(console, f"{size / 1e6:6.1f} MB", str(path))
        line(console, "open", str(files[0]))

    print_result(result, show, as_json)


def census(
    model: Model = None,
    index: IndexFolder = None,
    texts: Texts = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Count parameters only; read no text.")
    ] = False,
    max_tokens: MaxTokens = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Count what a model is made of, layer by layer: memory, attention, embeddings; idle neurons, and how many directions text uses.

    Idle neurons are those of the model's index. Directions are counted on the same texts where they are given, else on the model's own
    words: an index keeps only the texts that some neuron fires on.

    \b
    Examples:
      factsmith census atlas
      factsmith census path/to/model --quick
    """
    need_model(model, workspace)
    corpus = Paragraphs(texts) if texts else None
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
        from ..read.census import census as counted_parts

        read: dict[str, Any] = {}
        if quick:
            found = counted_parts(lm)
        else:
            from ..corpus.moments import enough_tokens, second_moments
            from ..corpus.moments_store import own_corpus
            from ..read.index_store import find_index

            scanned = find_index(lm, index, texts=corpus, max_tokens=max_tokens, progress=tell)
            read["idle"] = {
                "n_texts": scanned.triggers.n_texts,
                "n_tokens": scanned.triggers.n_tokens,
                "index": str(scanned.folder),
            }
            moments = {}
            if dense := [ffn.layer for ffn in lm.ffn if not ffn.n_experts]:
                n = min(enough_tokens(lm, dense), max_tokens or float("inf"))
                words = own_corpus(lm, n, 0, tell) if corpus is None else corpus
                moments = second_moments(
                    lm,
                    words,
                    dense,
                    max_tokens=n,
                    progress=lambda done: tell("second moments", done, round(n)),
                )
                whose = "the model's own words" if corpus is None else "the texts"
                read["effective_rank"] = {"n_tokens": moments[dense[0]].count, "of": whose}
            found = counted_parts(
                lm,
                triggers=scanned.triggers,
                moments={layer: moment.matrix for layer, moment in moments.items()},
            )

    def show(console: Console) -> None:
        show_tables(found.tables())(console)
        if idle := read.get("idle"):
            line(
                console,
                "idle",
                f"in {counted(idle['n_texts'], 'text')}, {counted(idle['n_tokens'], 'token')}, of {idle['index']}",
            )
        if rank := read.get("effective_rank"):
            line(
                console,
                "effective rank",
                f"in the first {counted(rank['n_tokens'], 'token')} of {rank['of']}",
            )

    print_result({**found.to_dict(), "read": read}, show, as_json)
