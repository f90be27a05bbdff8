"""factsmith: read, locate, patch and keep the facts in a transformer's feed-forward memory.

import factsmith as fs
lm = fs.load("atlas")
fact = fs.Fact("Bulgaria", "The currency of {} is the", "euro")
with fs.Workbench(lm, "my-workspace") as bench:
    bench.apply(fact)
    lm.answer([fact.text])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cards import Card, FactAdds, card, fact_adds
    from .edit.capacity import Capacity, Interference, capacity, interference
    from .edit.contexts import generate_contexts, generate_openings
    from .edit.delta import Delta, applied
    from .edit.finetune import FineTuneConfig, LoraConfig
    from .edit.kept import find_moments, load_moments
    from .edit.methods import AlphaEditConfig, EmmetConfig, MemitConfig, RomeConfig, alphaedit, emmet, memit, r_rome, rome, rome_each
    from .edit.moments import SecondMoment, second_moments
    from .edit.neurons import erase, rewrite
    from .edit.target import Targets, find_targets
    from .editing import configured, editors, usable
    from .errors import (
        DamagedError,
        FactError,
        FactsmithError,
        FingerprintError,
        InputError,
        LayerError,
        LedgerError,
        ModelError,
        ModelNotFoundError,
        NumericsError,
        RevisionError,
        SubjectError,
        TokenizerError,
        UnsupportedModelError,
        WorkspaceError,
    )
    from .export import Export, export_adapter, export_checkpoint, export_patch
    from .fact import Fact, FactFile, FactSheet, Gates, Probe
    from .folders import PatchFolder, read_patch
    from .inspect.agreement import Agreement, agreement
    from .inspect.census import Census, census
    from .inspect.composition import Composition, compose
    from .inspect.index import Index, build_index, find_index
    from .inspect.profile import Profile, profile
    from .inspect.refinement import Refinement, refinement
    from .inspect.statements import Statement, fact_labels, statements
    from .inspect.triggers import Trigger, Triggers, find_triggers
    from .inspect.values import ValueTokens, promoters, value_tokens
    from .judge.ability import ability
    from .judge.drift import Drift, Reference, drift
    from .judge.evaluate import Evaluation, evaluate
    from .judge.suites import Suite, load_suite
    from .ledger import Ledger
    from .locate.attribution import AttributionTrace, attribution_trace
    from .locate.average import AverageTrace, average_trace, causal_traces
    from .locate.causal import CausalTrace, causal_trace
    from .locate.intervene import Effect, effect, intervene, random_neurons
    from .locate.layers import LayerChoice, LayerScore, published
    from .locate.neurons import KnowledgeNeurons, knowledge_neurons, refine_relation
    from .model.ffn import FeedForward
    from .model.load import LanguageModel, load, wrap
    from .model.masked import MaskedLanguageModel
    from .pages import card_page, layer_page, write_pages
    from .plot import (
        agreement_chart,
        census_chart,
        class_lines,
        class_map,
        curves,
        evaluation_chart,
        heat_map,
        neuron_chart,
        prediction_chart,
        profile_bars,
        profile_lines,
        refinement_chart,
        text_heat_map,
    )
    from .proposals import Plan, Proposal
    from .recommend import recommend_layers
    from .records import Revision
    from .report import Report, report_markdown, report_page
    from .verify import Verification
    from .workbench import Diff, Outcome, Workbench

__version__ = "0.1.0"

_HOMES = {
    "cards": "Card FactAdds card fact_adds",
    "edit.capacity": "Capacity Interference capacity interference",
    "edit.delta": "Delta applied",
    "edit.finetune": "FineTuneConfig LoraConfig",
    "edit.contexts": "generate_contexts generate_openings",
    "edit.methods": "AlphaEditConfig EmmetConfig MemitConfig RomeConfig alphaedit emmet memit r_rome rome rome_each",
    "edit.kept": "find_moments load_moments",
    "edit.moments": "SecondMoment second_moments",
    "edit.neurons": "erase rewrite",
    "edit.target": "Targets find_targets",
    "editing": "configured editors usable",
    "errors": (
        "DamagedError FactError FactsmithError FingerprintError InputError LayerError LedgerError "
        "ModelError ModelNotFoundError NumericsError RevisionError SubjectError TokenizerError UnsupportedModelError WorkspaceError"
    ),
    "export": "Export export_adapter export_checkpoint export_patch",
    "fact": "Fact FactFile FactSheet Gates Probe",
    "folders": "PatchFolder read_patch",
    "inspect.agreement": "Agreement agreement",
    "inspect.census": "Census census",
    "inspect.composition": "Composition compose",
    "inspect.index": "Index build_index find_index",
    "inspect.profile": "Profile profile",
    "inspect.refinement": "Refinement refinement",
    "inspect.statements": "Statement fact_labels statements",
    "inspect.triggers": "Trigger Triggers find_triggers",
    "inspect.values": "ValueTokens promoters value_tokens",
    "judge.ability": "ability",
    "judge.drift": "Drift Reference drift",
    "judge.evaluate": "Evaluation evaluate",
    "judge.suites": "Suite load_suite",
    "ledger": "Ledger",
    "locate.attribution": "AttributionTrace attribution_trace",
    "locate.average": "AverageTrace average_trace causal_traces",
    "locate.causal": "CausalTrace causal_trace",
    "locate.intervene": "Effect effect intervene random_neurons",
    "locate.layers": "LayerChoice LayerScore published",
    "locate.neurons": "KnowledgeNeurons knowledge_neurons refine_relation",
    "model.ffn": "FeedForward",
    "model.load": "LanguageModel load wrap",
    "model.masked": "MaskedLanguageModel",
    "pages": "card_page layer_page write_pages",
    "plot": (
        "agreement_chart census_chart class_lines class_map curves evaluation_chart heat_map neuron_chart "
        "prediction_chart profile_bars profile_lines "
        "refinement_chart text_heat_map"
    ),
    "report": "Report report_markdown report_page",
    "verify": "Verification",
    "proposals": "Plan Proposal",
    "recommend": "recommend_layers",
    "records": "Revision",
    "workbench": "Diff Outcome Workbench",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Agreement",
    "AlphaEditConfig",
    "AttributionTrace",
    "AverageTrace",
    "Capacity",
    "Card",
    "CausalTrace",
    "Census",
    "Composition",
    "DamagedError",
    "Delta",
    "Diff",
    "Drift",
    "Effect",
    "EmmetConfig",
    "Evaluation",
    "Export",
    "Fact",
    "FactAdds",
    "FactError",
    "FactFile",
    "FactSheet",
    "FactsmithError",
    "FeedForward",
    "FineTuneConfig",
    "FingerprintError",
    "Gates",
    "Index",
    "InputError",
    "Interference",
    "KnowledgeNeurons",
    "LanguageModel",
    "LayerChoice",
    "LayerError",
    "LayerScore",
    "Ledger",
    "LedgerError",
    "LoraConfig",
    "MaskedLanguageModel",
    "MemitConfig",
    "ModelError",
    "ModelNotFoundError",
    "NumericsError",
    "Outcome",
    "PatchFolder",
    "Plan",
    "Probe",
    "Profile",
    "Proposal",
    "Reference",
    "Refinement",
    "Report",
    "Revision",
    "RevisionError",
    "RomeConfig",
    "SecondMoment",
    "Statement",
    "SubjectError",
    "Suite",
    "Targets",
    "TokenizerError",
    "Trigger",
    "Triggers",
    "UnsupportedModelError",
    "ValueTokens",
    "Verification",
    "Workbench",
    "WorkspaceError",
    "__version__",
    "ability",
    "agreement",
    "agreement_chart",
    "alphaedit",
    "applied",
    "attribution_trace",
    "average_trace",
    "build_index",
    "capacity",
    "card",
    "card_page",
    "causal_trace",
    "causal_traces",
    "census",
    "census_chart",
    "class_lines",
    "class_map",
    "compose",
    "configured",
    "curves",
    "drift",
    "editors",
    "effect",
    "emmet",
    "erase",
    "evaluate",
    "evaluation_chart",
    "export_adapter",
    "export_checkpoint",
    "export_patch",
    "fact_adds",
    "fact_labels",
    "find_index",
    "find_moments",
    "find_targets",
    "find_triggers",
    "generate_contexts",
    "generate_openings",
    "heat_map",
    "interference",
    "intervene",
    "knowledge_neurons",
    "layer_page",
    "load",
    "load_moments",
    "load_suite",
    "memit",
    "neuron_chart",
    "prediction_chart",
    "profile",
    "profile_bars",
    "profile_lines",
    "promoters",
    "published",
    "r_rome",
    "random_neurons",
    "read_patch",
    "recommend_layers",
    "refine_relation",
    "refinement",
    "refinement_chart",
    "report_markdown",
    "report_page",
    "rewrite",
    "rome",
    "rome_each",
    "second_moments",
    "statements",
    "text_heat_map",
    "usable",
    "value_tokens",
    "wrap",
    "write_pages",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and `factsmith --help` does not need it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
