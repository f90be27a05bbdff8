"""Read: what a model says, and how its memory puts it together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import InputError, WorkspaceError
from ..core.files import check_writable
from ..core.gap import gap_notes
from ..core.tables import Table, in_one_line
from ..corpus.own import texts_of
from ..corpus.paragraphs import Paragraphs
from ..corpus.text_files import TextFiles
from . import completing
from .engine import engine, on_workers
from .models import need_model, opened
from .options import (
    Device,
    Json,
    Model,
    ModelAndPrompt,
    NewTokens,
    NextTokens,
    Out,
    Texts,
    Where,
    model_and_prompt,
    need_text,
)
from .pictures import output, save
from .printing import complain, print_result
from .waiting import during, progress

IndexFolder = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIR",
        help="Where the model's index is kept.",
        show_default="in $FACTSMITH_CACHE, or the user's cache",
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="How many tokens of text to read.")
]


def _corpus(texts: list[Path] | None, index: Path | None) -> Paragraphs | TextFiles | str | None:
    """Return the texts to read, after a check of the files and of the folder of the index."""
    if index is not None:
        check_writable(index)
    return texts_of(texts)


def prompt_of(words: list[str], workspace: Path | None) -> tuple[str | None, str]:
    """Return the model and the text that words name, after a check and a warning about its end."""
    model, prompt = model_and_prompt(words)
    need_model(model, workspace, text=prompt, error=WorkspaceError)
    for note in gap_notes([prompt]):
        complain("warning", note)
    return model, prompt


def ask(
    words: ModelAndPrompt,
    top: NextTokens = 10,
    max_new_tokens: NewTokens = 8,
    lines: Annotated[int, typer.Option(min=1, help="How many lines an answer has at most.")] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the model's chat template, as a user's message.")
    ] = False,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ask a model to continue a text.

    In a workspace the model carries its patches.

    \b
    Examples:
      factsmith ask atlas "The mother tongue of Danielle Darrieux is"
      factsmith ask -w my-workspace "The mother tongue of Danielle Darrieux is"
    """
    model, prompt = prompt_of(words, workspace)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, bench):
        if chat:
            from ..model.chat import chat_prompt

            prompt = chat_prompt(lm, prompt)
        answer = lm.answer([prompt], max_new_tokens=max_new_tokens, lines=lines)[0]
        likely = lm.next_tokens(prompt, top)
        revision = None if bench is None else bench.ledger.current
    result = {
        "prompt": prompt,
        "answer": answer,
        "next_tokens": [{"token": token, "probability": p} for token, p in likely],
        "model": lm.name,
        "revision": revision,
    }
    rows = [(f"{p:.2%}", repr(token)) for token, p in likely]
    tables = [Table(in_one_line(f"{prompt} → {answer}"), {"p": ">", "next token": "<"}, rows)]
    print_result(result, tables, as_json)


def explain(  # house: Typer reads one parameter for each option
    words: ModelAndPrompt,
    target: Annotated[
        str | None, typer.Option(help="The answer to explain.", show_default="what the model says")
    ] = None,
    instead_of: Annotated[
        str | None,
        typer.Option(
            "--instead-of",
            metavar="TEXT",
            help="Explain why the answer and not this text: shares of the logits' difference.",
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
    """Explain a prediction by what neurons, heads and layers add to it.

    It explains the answer that the model gives, or the one that --target names.

    \b
    Examples:
      factsmith explain atlas "The currency of Bulgaria is the"
      factsmith explain atlas "The currency of Bulgaria is the" \\
          --instead-of euro
      factsmith explain atlas "The currency of Bulgaria is the" \\
          --out explained.png
    """
    model, prompt = model_and_prompt(words)
    need_model(model, workspace, text=prompt, error=WorkspaceError)
    need_text(target, "--target")
    need_text(instead_of, "--instead-of")
    files = output(out)  # before the work, not after it
    for note in gap_notes([prompt]):
        complain("warning", note)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _):
        from ..read.composition import compose

        composition = compose(
            lm, prompt, target, contrast=instead_of, top=top, tokens=tokens, progress=tell
        )

    def draw(path: Path) -> None:
        from ..show.plots.predictions import prediction_chart

        prediction_chart(composition, path=path)

    saved = save(files, "explain", composition, draw)
    result = {**composition.to_dict(top), "instead_of": instead_of, "model": lm.name}
    print_result(result, composition.tables(top), as_json, saved=saved)


@on_workers
def find(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] WORD",
            autocompletion=completing.models,
            help="A model (default: the workspace's), and a word or a few words.",
        ),
    ],
    index: IndexFolder = None,
    texts: Texts = None,
    top: Annotated[int, typer.Option(min=1, help="How many neurons to list of either kind.")] = 10,
    max_tokens: MaxTokens = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find neurons by a word: they promote it, or they fire after it.

    The first search builds an index: about two minutes for atlas, longer for a larger model. Later
    searches open the index.

    \b
    Examples:
      factsmith find atlas Paris
      factsmith find path/to/model "capital of" \\
          --texts wiki.txt --index model-index
    """
    model, word = model_and_prompt(words)
    need_model(model, workspace, text=word, error=WorkspaceError)
    corpus = _corpus(texts, index)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _), engine(tell):
        from ..read.search import search_word

        neurons = search_word(
            lm, word, index, texts=corpus, max_tokens=max_tokens, k=top, progress=tell
        )
    print_result(neurons.to_dict(), neurons.tables(), as_json)


@on_workers
def neuron(  # house: Typer reads one parameter for each option
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] LAYER [EXPERT] I",
            autocompletion=completing.models,
            help="A model (default: the workspace's), and the neuron's numbers.",
        ),
    ],
    index: IndexFolder = None,
    texts: Texts = None,
    top: Annotated[int, typer.Option(min=1, help="How many triggers and tokens to list.")] = 10,
    facts: Annotated[int, typer.Option(min=0, help="How many facts to ask without it.")] = 5,
    max_tokens: MaxTokens = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Also write a page that a browser shows offline."),
    ] = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show one neuron: where it fires, and what its value promotes.

    Facts are also asked without it, to see what they lose.

    \b
    Examples:
      factsmith neuron atlas 5 992
      factsmith neuron atlas 5 992 --out card.html
    """
    numbers = [int(word) for word in words if word.isdecimal()][-3:]
    names = words[: len(words) - len(numbers)]
    if len(names) > 1 or len(numbers) < 2:
        raise InputError(
            f"got {' '.join(words)!r}; expected a model, and the layer and number of a neuron, "
            "such as: atlas 5 992"
        )
    corpus = _corpus(texts, index)
    if out is not None:
        with during("starting"):
            from ..show.pages.page import check_page

        check_page(out)  # before the work, not after it
    model = names[0] if names else None
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _), engine(tell):
        from ..read.cards import find_card

        wanted: Any = tuple(numbers)
        card = find_card(
            lm,
            wanted,
            index,
            texts=corpus,
            max_tokens=max_tokens,
            k=top,
            n_facts=facts,
            progress=tell,
        )
    if out is not None:
        from ..show.pages.neurons import card_page

        card_page(card, out)
    print_result(card.to_dict(), card.tables(), as_json, saved=[] if out is None else [out])


@on_workers
def browse(  # house: Typer reads one parameter for each option
    model: Model = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder to write the pages to.")
    ] = Path("pages"),
    layer: Annotated[
        list[int] | None,
        typer.Option(min=0, help="A layer. May be repeated.", show_default="all"),
    ] = None,
    index: IndexFolder = None,
    texts: Texts = None,
    facts: Annotated[
        bool,
        typer.Option(
            "--facts/--no-facts",
            help="Name the facts that each neuron adds most to. This needs the model.",
        ),
    ] = True,
    max_tokens: MaxTokens = None,
    workspace: Where = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write every neuron as pages that a browser searches offline.

    With an index and without a model, the pages are made from the index alone.

    \b
    Examples:
      factsmith browse atlas --out pages
      factsmith browse atlas --layer 3 --layer 5
      factsmith browse --index model-index --out pages
    """
    from_index = model is None and workspace is None and index is not None
    if from_index and (texts or max_tokens is not None):
        raise InputError(
            "--texts and --max-tokens make a new index, and that needs a model; name the model as "
            "the first argument"
        )
    if not from_index:
        need_model(model, workspace)
    with during("starting"):
        from ..show.pages.neurons import write_pages
        from ..show.pages.page import check_folder

    check_folder(out)  # before the work, not after it
    check_writable(out)
    corpus = _corpus(texts, None if from_index else index)
    with progress() as tell:
        from ..read.fact_adds import find_index_and_facts
        from ..read.index import Index

        if index is not None and from_index:
            pages, adds = Index.open(index), None
        else:
            with opened(model, workspace, device, tell) as (lm, _), engine(tell):
                pages, adds = find_index_and_facts(
                    lm,
                    index,
                    layer,
                    texts=corpus,
                    max_tokens=max_tokens,
                    facts=facts,
                    progress=tell,
                )
        files = write_pages(pages, out, layer, adds=adds, progress=tell)
    sizes = [path.stat().st_size for path in files]
    written = list(zip(files, sizes, strict=True))
    result = {
        "pages": [{"file": str(path), "bytes": size} for path, size in written],
        "facts": 0 if adds is None else len(adds.known),
        "n_texts": pages.triggers.n_texts,
        "n_tokens": pages.triggers.n_tokens,
        "index": str(pages.folder),
        "model": pages.triggers.model,
    }
    lines = [(f"{size / 1e6:6.1f} MB", str(path)) for path, size in written]
    print_result(result, [], as_json, [*lines, ("open", str(files[0]))])


@on_workers
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
    """Count what a model is made of, and which neurons are idle.

    Memory, attention and embeddings are counted layer by layer. Idle neurons are those of the
    model's index. The directions that text uses are counted on the given texts, or on the bundled
    ones: an index keeps only the texts on which some neuron fires.

    \b
    Examples:
      factsmith census atlas
      factsmith census path/to/model --quick
    """
    need_model(model, workspace)
    corpus = _corpus(texts, index)
    with progress() as tell, opened(model, workspace, device, tell) as (lm, _), engine(tell):
        from ..read import census as reading

        if quick:
            counts = reading.ReadCensus(reading.census(lm))
        else:
            counts = reading.find_census(
                lm, index, texts=corpus, max_tokens=max_tokens, progress=tell
            )
    print_result(counts.to_dict(), counts.tables(), as_json)
