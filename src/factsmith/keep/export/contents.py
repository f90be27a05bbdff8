"""The contents of an export: a model, its patches, and where each patch comes from.

contents = Contents.of(lm, deltas, origins)      # checked: the deltas fit the model
contents.layers, contents.n_facts, contents.model_bytes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import InputError, UnsupportedModelError
from ...core.tables import counted
from ...edit.delta import Delta, homes, patched, read_weights
from ...edit.widening import check_rows
from ...model.adapters import adapter_error, adapter_kind
from ...model.appended import by_layer
from ...model.language_model import LanguageModel, check_model


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a workspace that is exported.

    Attributes:
        revision: The id of the revision that is exported.
        created: The UTC time of that revision, in ISO 8601.
    """

    revision: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a patch comes from, as its workspace records it.

    Attributes:
        revision: The id of the revision that committed it. None: no workspace did.
        message: The message of that revision, one line.
        moments: The sha256 of the second moments it was made with. None: not recorded.
        created: The UTC time of that revision, in ISO 8601. "": not recorded.
        report: The evaluation stored with that revision, as plain JSON values. None: not recorded.
        changed: Whether a later revision took facts out of the patch, or solved it again.
        state: The state of the workspace that is exported. None: no workspace is.
    """

    revision: str | None = None
    message: str = ""
    moments: str | None = None
    created: str = ""
    report: Mapping[str, Any] | None = None
    changed: bool = False
    state: State | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest says of the patch, as plain JSON values."""
        return {"revision": self.revision, "message": self.message, "moments": self.moments}


def check_no_neurons(format: str, n: int) -> None:
    """Check that there are no appended neurons, which an adapter cannot hold.

    Args:
        format: "adapter" or "gguf-adapter".
        n: How many neurons the patches append.

    Raises:
        InputError: when there are some.
    """
    if n:
        whole = "a checkpoint" if format == "adapter" else "a gguf file or a checkpoint"
        raise InputError(
            f"format is {format!r}, and the patches append {counted(n, 'neuron')}: an adapter can "
            f"change weights, and cannot add any. Export {whole}, or a patch for another "
            "workspace.",
            argument="format",
        )


@dataclass(frozen=True)
class Contents:
    """What an export holds.

    Attributes:
        lm: The model, without the patches.
        deltas: The patches, in the order in which they are added.
        origins: Where each patch comes from.
    """

    lm: LanguageModel
    deltas: tuple[Delta, ...]
    origins: tuple[Origin, ...]

    @classmethod
    def of(
        cls, lm: LanguageModel, deltas: Delta | Iterable[Delta], origins: Sequence[Origin]
    ) -> Contents:
        """Check a model and deltas, and return them as the contents of an export.

        Args:
            lm: The model, without the deltas.
            deltas: One delta or several, in the order in which they are added.
            origins: One for each delta. (): the manifest does not say where the deltas come from.

        Raises:
            InputError: when there is no delta, a delta does not fit the model, or the numbers of
                deltas and origins differ.
            UnsupportedModelError: when the model is masked, or a layer cannot be edited.
        """
        check_model(lm)
        if not lm.is_causal:
            raise UnsupportedModelError(
                f"{lm.name} is a masked language model. Only models that continue text can be "
                "exported."
            )
        if (adapter := adapter_kind(lm.module)) is not None:
            raise adapter_error(lm.name, adapter)  # it was put on after the model was wrapped
        several = (deltas,) if isinstance(deltas, Delta) else tuple(deltas)
        if not several:
            raise InputError(
                "deltas is empty: there is no patch to export. Give at least one Delta.",
                argument="deltas",
            )
        if strange := [type(each).__name__ for each in several if not isinstance(each, Delta)]:
            raise InputError(
                f"deltas has a {strange[0]}. Give at least one Delta, and only Deltas.",
                argument="deltas",
            )
        if origins and len(origins) != len(several):
            raise InputError(
                f"origins has {len(origins)} entries for {len(several)} deltas. Give one for each "
                "delta, or leave origins out.",
                argument="origins",
            )
        if not all(isinstance(each.message, str) for each in origins):
            raise InputError(
                "origins has a message that is not text. Give each message as text.",
                argument="origins",
            )
        contents = cls(lm, several, tuple(origins) or (Origin(),) * len(several))
        for layer in contents.layers:  # raises if they do not fit
            patched(read_weights(lm, [layer]), several, partly=True)
        check_rows(lm.ffn, by_layer([delta.appended for delta in several]), homes(lm))
        return contents

    @property
    def state(self) -> State | None:
        """The state of the workspace that is exported; None without a workspace."""
        return self.origins[-1].state

    @property
    def layers(self) -> set[int]:
        """The layers whose own neurons change."""
        return {layer for delta in self.deltas for layer in delta.layers}

    @property
    def appended(self) -> dict[int, int]:
        """{layer: how many neurons are appended to it}."""
        rows = by_layer([delta.appended for delta in self.deltas])
        return {layer: len(neurons) for layer, neurons in rows.items()}

    @property
    def n_appended(self) -> int:
        """How many neurons the patches append."""
        return sum(self.appended.values())

    @property
    def n_facts(self) -> int:
        """How many facts the patches hold."""
        return sum(len(delta.facts) for delta in self.deltas)

    @property
    def model_bytes(self) -> int:
        """The size of the model's weights in memory."""
        return sum(each.numel() * each.element_size() for each in self.lm.module.parameters())
