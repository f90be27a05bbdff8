"""The room Trace: where a model keeps a fact.

TRACE      causal tracing of one text: tokens by layers
AT         the strongest neurons of one layer at one token
NEURONS    the neurons that carry a fact, and a check of them
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from ...core.progress import Progress
from ...locate.attribution import attribution_trace
from ...locate.causal import causal_trace
from ...locate.kinds import CorruptionKind, Part, TraceKind, uses_window
from ...locate.question import answer_to_follow, fill_prompts, prompt_warnings
from ...locate.records import CausalTrace
from ...model.subject import read_prompt
from ...read.token_neurons import token_neurons
from ...show.charts.neurons import share_bars
from ...show.charts.traces import heat_map
from ..arguments import Source
from ..desk import Desk, Place
from ..verb import Answer, Verb
from .calls import call, command, literal, program
from .fields import LARGEST_SEED, PROMPT, OptionalText, Text, is_bundled, naming
from .memory import InterveneArguments, card_link, card_links

# ── causal traces ─────────────────────────────────────────────────────────────────────────────────


class TraceArguments(Source):
    """What to trace, and how."""

    prompt: Text = Field(
        title="Prompt",
        description="A text that has the subject, or {} in its place.",
        json_schema_extra=PROMPT,
    )
    subject: Text = Field(
        title="Subject",
        description="The part of the text to corrupt, or what goes into its {}.",
        json_schema_extra={"placeholder": "Bulgaria"},
    )
    target: OptionalText = Field(
        default="",
        title="Answer",
        description="The answer whose probability is measured. Empty: the model's own, up to the "
        "first punctuation.",
    )
    kind: TraceKind = Field(
        default="state",
        title="Restore",
        description="What to restore: the whole state after a layer, or what its MLP or attention "
        "adds.",
    )
    fast: bool = Field(
        default=False,
        title="Estimate",
        description="Estimate the map from gradients, which is faster. The page says how well the "
        "estimate orders the cells.",
    )
    sever: Part | None = Field(
        default=None,
        title="Sever",
        description="Hold this part at its corrupted values above the restored state.",
        json_schema_extra={
            "options": [["", "nothing"], ["mlp", "mlp"], ["attention", "attention"]],
            "advanced": True,
        },
    )
    window: int | None = Field(
        default=None,
        ge=1,
        title="Window",
        description="Neighbouring layers restored together, for mlp and attention. Empty: 10.",
        json_schema_extra={"advanced": True},
    )
    corruption: CorruptionKind = Field(
        default="noise",
        title="Corruption",
        description="Noise on the subject, or other subjects in its place.",
        json_schema_extra={"advanced": True},
    )
    noise: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        title="Noise",
        description="Scale of the noise. Empty: 3 sigma of the subject's embeddings.",
        json_schema_extra={"advanced": True},
    )
    replacements: list[str] = Field(
        default=[],
        title="Other subjects",
        description="Subjects to put in its place. Empty: bundled ones.",
        json_schema_extra={"advanced": True},
    )
    samples: int = Field(
        default=10,
        ge=1,
        le=200,
        title="Samples",
        description="Corrupted runs to average.",
        json_schema_extra={"advanced": True},
    )
    seed: int = Field(
        default=1,
        ge=0,
        le=LARGEST_SEED,
        title="Seed",
        description="Of the noise, or of the choice of other subjects.",
        json_schema_extra={"advanced": True},
    )
    occurrence: int | None = Field(
        default=None,
        ge=1,
        title="Occurrence",
        description="Which occurrence of the subject, counted from 1. Empty: the only one.",
        json_schema_extra={"advanced": True},
    )
    force: bool = Field(
        default=False,
        title="Follow this answer",
        description="Follow the answer even if the model says something else.",
        json_schema_extra={"advanced": True},
    )

    @field_validator("sever", "window", "noise", "replacements")
    @classmethod
    def _fits(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a value that has no effect together with the others."""
        reason = unsupported(info.data).get(info.field_name or "")
        if reason and value not in (None, []):
            raise ValueError(f"cannot be used: {reason}")
        return value

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that both kinds of trace take."""
        settings: dict[str, Any] = {
            "occurrence": self.occurrence,
            "kind": self.kind,
            "corruption": self.corruption,
            "replacements": self.replacements or None,
            "samples": self.samples,
            "noise": self.noise,
            "seed": self.seed,
        }
        if self.window is not None:
            settings["window"] = self.window
        if self.sever is not None:
            settings["sever"] = self.sever
        return settings


def unsupported(values: Mapping[str, Any]) -> dict[str, str]:
    """Return {argument: why it cannot be used} for the kind of trace that these values name."""
    kind: Any = values.get("kind") or "state"
    corruption = values.get("corruption") or "noise"
    reasons = {}
    if values.get("fast") in (True, "true"):
        reasons["sever"] = "An estimate cannot hold a part at its corrupted values."
    elif kind != "state":
        reasons["sever"] = "Only a restored state can be cut off from the layers above."
    if not uses_window(kind):
        reasons["window"] = "A state is restored alone."
    if corruption == "replace":
        reasons["noise"] = "Other subjects replace the noise."
    else:
        reasons["replacements"] = "Other subjects are used only when the corruption is replace."
    return reasons


def trace_limits(desk: Desk, values: Mapping[str, Any]) -> dict[str, str]:
    """Return {field: why it cannot be used}, for the form of a trace."""
    return unsupported(values)


def _run_trace(desk: Desk, arguments: TraceArguments, tell: Progress) -> Answer:
    """Trace one text."""
    (text,) = fill_prompts([arguments.prompt], arguments.subject, single_slot=True)
    read_prompt(arguments.prompt, arguments.subject, occurrence=arguments.occurrence)
    with desk.reading(arguments, tell) as lm, naming("prompt"):
        answer = answer_to_follow(lm, [text], arguments.target or None, force=arguments.force)
        trace: CausalTrace = (attribution_trace if arguments.fast else causal_trace)(
            lm,
            arguments.prompt,
            arguments.subject,
            target=answer.target,
            progress=lambda done, total: tell("tracing", done, total),
            **arguments.settings,
        )

    def spot(row: Mapping[str, Any]) -> str:
        return _at(trace, arguments, int(row["layer"]), int(row["column"])).address("/trace/at")

    token, layer = trace.peak
    return Answer(
        trace.to_dict(),
        trace.tables(),
        [heat_map(trace).linked(spot)],
        notes=trace.notes,
        warnings=[*prompt_warnings([text]), *answer.warnings, *trace.warnings],
        view={
            "trace": trace,
            "most": float(trace.scores.max()),
            "peak": (
                trace.tokens[token],
                layer,
                _at(trace, arguments, layer, token).address("/trace/at"),
            ),
            "best_links": [
                _at(trace, arguments, best, t).address("/trace/at")
                for t, best in enumerate(trace.scores.argmax(1).tolist())
            ],
            "others": _other_traces(arguments),
        },
    )


def _at(trace: CausalTrace, source: Source, layer: int, position: int) -> AtArguments:
    """Return the arguments for the neurons of one cell of a trace."""
    return AtArguments(
        prompt=trace.prompt,
        layer=layer,
        position=position,
        model=source.model,
        revision=source.revision,
    )


def _other_traces(arguments: TraceArguments) -> list[tuple[str, str]]:
    """Return (label, address) of the other maps of the same text."""
    plain = {"sever": None, "window": None, "fast": False}
    maps: dict[str, dict[str, Any]] = {
        "states": {"kind": "state"},
        "mlp": {"kind": "mlp"},
        "attention": {"kind": "attention"},
        "states, mlp severed": {"kind": "state", "sever": "mlp"},
        "states, attention severed": {"kind": "state", "sever": "attention"},
    }
    others = []
    for label, change in maps.items():
        other = arguments.model_copy(update={**plain, **change})
        if (other.kind, other.sever) != (arguments.kind, arguments.sever):
            others.append((label, other.address("/trace/trace")))
    return others


def _trace_python(arguments: TraceArguments, place: Place) -> str:
    """Return the program that traces the same."""
    imports = ["from factsmith.locate.question import answer_to_follow, fill_prompts"]
    given = {} if not arguments.force else {"force": True}
    target = literal(arguments.target or None)
    defaults = TraceArguments(prompt="x", subject="x").settings
    changed = {
        name: value
        for name, value in arguments.settings.items()
        if name not in defaults or value != defaults[name]
    }
    body = [
        call(
            "prompts = fill_prompts",
            literal([arguments.prompt]),
            literal(arguments.subject),
            single_slot=True,
        ),
        call("answer = answer_to_follow", "lm", "prompts", target, **given),
        call(
            f"trace = fs.{'attribution_trace' if arguments.fast else 'causal_trace'}",
            "lm",
            literal(arguments.prompt),
            literal(arguments.subject),
            "target=answer.target",
            **changed,
        ),
        "print(json.dumps(trace.to_dict()))",
    ]
    return program(arguments, place, body, imports)


def _trace_command(arguments: TraceArguments, place: Place) -> list[str]:
    """Return the command that traces the same."""
    fields = TraceArguments.model_fields
    options: dict[str, Any] = {"--subject": arguments.subject}
    for name, flag in (
        ("target", "--target"),
        ("kind", "--kind"),
        ("fast", "--fast"),
        ("sever", "--sever"),
        ("window", "--window"),
        ("corruption", "--corruption"),
        ("noise", "--noise"),
        ("replacements", "--replacement"),
        ("samples", "--samples"),
        ("seed", "--seed"),
        ("occurrence", "--occurrence"),
        ("force", "--force"),
    ):
        value = getattr(arguments, name)
        options[flag] = None if value == fields[name].default else value
    return command(arguments, place, "trace", [arguments.prompt], options)


def trace_examples(desk: Desk) -> list[tuple[str, TraceArguments]]:
    """Return examples for the empty form: (label, arguments)."""
    if is_bundled(desk):
        bulgaria = {"prompt": "The currency of Bulgaria is the", "subject": "Bulgaria"}
        return [
            ("Bulgaria's currency", TraceArguments(**bulgaria)),
            ("Fiat 127's maker", TraceArguments(prompt="The maker of {} is", subject="Fiat 127")),
            (
                "Bulgaria's currency, what the mlp adds",
                TraceArguments(**bulgaria, kind="mlp", window=2),
            ),
        ]
    prompt, subject = "The Space Needle is in the city of", "Space Needle"
    return [
        (f"{prompt} …", TraceArguments(prompt=prompt, subject=subject)),
        (
            "The capital of France is …",
            TraceArguments(prompt="The capital of France is", subject="France"),
        ),
    ]


# ── one token, one layer ──────────────────────────────────────────────────────────────────────────


class AtArguments(Source):
    """Which layer and which token."""

    prompt: Text = Field(title="Prompt", description="The text.", json_schema_extra=PROMPT)
    layer: int = Field(ge=0, title="Layer", description="The layer, counted from 0.")
    position: int = Field(
        default=-1,
        title="Token",
        description="The number of the token, counted from 0; -1 is the last one.",
    )
    top: int = Field(
        default=15,
        ge=1,
        le=200,
        title="Neurons",
        description="How many neurons to list.",
        json_schema_extra={"advanced": True},
    )
    tokens: int = Field(
        default=6,
        ge=1,
        le=50,
        title="Tokens",
        description="How many tokens of each neuron's value to list.",
        json_schema_extra={"advanced": True},
    )


def _run_at(desk: Desk, arguments: AtArguments, tell: Progress) -> Answer:
    """List the strongest neurons of one layer at one token."""
    with desk.reading(arguments, tell) as lm, naming("prompt"):
        spot = token_neurons(
            lm,
            arguments.prompt,
            arguments.layer,
            arguments.position,
            top=arguments.top,
            tokens=arguments.tokens,
        )
        n_layers = lm.n_layers
    neurons = [each.neuron for each in spot.strongest]
    silence = InterveneArguments.of_neurons(arguments.prompt, neurons[:5], arguments)
    return Answer(
        spot.to_dict(),
        spot.tables(),
        [share_bars(spot).linked(card_link(arguments))],
        view={
            "spot": spot,
            "neuron_links": card_links(neurons, arguments),
            "moved": _moved(arguments, spot.position, n_layers, len(spot.tokens)),
            "silence": silence.address("/memory/intervene"),
        },
    )


def _moved(
    arguments: AtArguments, position: int, n_layers: int, n_tokens: int
) -> list[tuple[str, str]]:
    """Return (label, address) of the neighbouring layers and tokens."""
    layer = arguments.layer
    places = (
        ("layer below", layer - 1, position),
        ("layer above", layer + 1, position),
        ("token before", layer, position - 1),
        ("token after", layer, position + 1),
    )
    return [
        (label, arguments.model_copy(update={"layer": a, "position": t}).address("/trace/at"))
        for label, a, t in places
        if 0 <= a < n_layers and 0 <= t < n_tokens
    ]


def _at_python(arguments: AtArguments, place: Place) -> str:
    """Return the program that lists the same."""
    read = call(
        "spot = fs.token_neurons",
        "lm",
        literal(arguments.prompt),
        str(arguments.layer),
        str(arguments.position),
        top=arguments.top,
        tokens=arguments.tokens,
    )
    return program(arguments, place, [read, "print(json.dumps(spot.to_dict()))"])


def _at_command(arguments: AtArguments, place: Place) -> list[str]:
    """Return the command that lists the same."""
    options = {
        "--layer": arguments.layer,
        "--token": arguments.position,
        "--top": arguments.top,
        "--tokens": arguments.tokens,
    }
    return command(arguments, place, "at", [arguments.prompt], options)


def at_examples(desk: Desk) -> list[tuple[str, AtArguments]]:
    """Return examples for the empty form: (label, arguments)."""
    if not is_bundled(desk):
        return [
            ("The capital of France is …", AtArguments(prompt="The capital of France is", layer=0))
        ]
    prompt = "The currency of Bulgaria is the"
    return [("Bulgaria in layer 1", AtArguments(prompt=prompt, layer=1, position=3))]


TRACE = Verb(
    "trace",
    "Trace",
    "Corrupt the subject, restore one state at a time, and see which brings the answer back.",
    TraceArguments,
    _run_trace,
    _trace_python,
    _trace_command,
    template="answers/trace.html",
    button="Trace",
    disabled=trace_limits,
    examples=trace_examples,
)

AT = Verb(
    "at",
    "Neurons at a token",
    "List the neurons that add most in one layer at one token.",
    AtArguments,
    _run_at,
    _at_python,
    _at_command,
    template="answers/at.html",
    button="Show",
    examples=at_examples,
)
